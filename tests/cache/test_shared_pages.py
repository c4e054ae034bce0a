"""Caches that share pages: what becomes of one of them changes no other, and no prompt that is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_fastattn
from tests.cache.test_cache_object import go_on, prefilled
from tests.cache.test_written_in_place import steer_last_value
from tests.generation.calls import run
from tests.tools.models import assert_fast, pair, single, tiny


def written_and_computed(cache: Any, model: Any) -> None:
    steer_last_value(cache)
    go_on(model, cache, None, 1)


def replaced(cache: Any, model: Any) -> None:
    cache.layers[0].values = cache.layers[0].values * 2


def written_and_pickled(cache: Any, model: Any) -> None:
    steer_last_value(cache)
    pickle.dumps(cache)


def one_layer_cropped(cache: Any, model: Any) -> None:
    cache.layers[0].crop(-1)


def cropped_and_written(cache: Any, model: Any) -> None:
    cache.crop(-1)
    steer_last_value(cache)
    go_on(model, cache, None, 1)


def given_to_an_unpatched_model(cache: Any, model: Any) -> None:
    go_on(tiny("llama"), cache, None, 1)


WAYS: dict[str, Callable[[Any, Any], None]] = {
    way.__name__: way
    for way in (
        written_and_computed, replaced, written_and_pickled, one_layer_cropped, cropped_and_written,
        given_to_an_unpatched_model,
    )
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("other", ["the fork", "the original"])
def test_forks_are_apart(way: str, other: str) -> None:
    _, model = pair("llama")
    cache = prefilled(model, single(24), hf_fastattn.PagedCache(model.config))
    want = go_on(model, copy.deepcopy(cache), None, 3)
    keys = [layer.keys.clone() for layer in cache.layers]
    fork = hf_fastattn.fork(cache, [0])
    changed, kept = (fork, cache) if other == "the fork" else (cache, fork)
    WAYS[way](changed, model)
    assert all(torch.equal(layer.keys, before) for layer, before in zip(kept.layers, keys, strict=True))
    assert torch.equal(go_on(model, kept, None, 3), want)
    assert_fast(model, held=None)


@pytest.mark.parametrize("way", list(WAYS))
def test_kept_prompts_stay(way: str) -> None:
    stock, model = pair("llama", {"prefix_cache": True})
    want = run(stock, single(), 8)
    cache = model.generate(**single(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    WAYS[way](next(value for value in cache.values() if isinstance(value, hf_fastattn.PagedCache)), model)
    for _ in range(2):
        assert torch.equal(run(model, single(), 8), want)
        assert assert_fast(model, prompt_tokens=None, shared=None, held=None).tokens_reused > 0
