"""Keys and values that hooks of a forward read, and write in place: they count as in layers of Transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.cache.test_cache_object import go_on, prefilled
from tests.generation.calls import run
from tests.tools.models import OLD, assert_fast, pair, single

Way = Callable[[Any, Any], None]


def own_newest(cache: Any, index: int) -> None:
    cache.layers[index].values[:, :, -1] += 0.5


def own_then_all_read(cache: Any, index: int) -> None:
    cache.layers[index].values[:, :, 4] += 0.7
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape


def first_then_all_read(cache: Any, index: int) -> None:
    if index == 0:
        cache.layers[0].values[:, :, 4] += 0.7
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape


def later_layers_past(cache: Any, index: int) -> None:
    if index == 0:
        cache.layers[2].values[:, :, 4] += 0.7


def own_past_before_it_is_read(cache: Any, index: int) -> None:
    cache.layers[index].values[:, :, 0:4] += 0.7


AFTER, BEFORE = (own_newest, own_then_all_read, first_then_all_read, later_layers_past), (own_past_before_it_is_read,)


@contextlib.contextmanager
def hooked(model: Any, cache: Any, way: Any) -> Iterator[None]:
    def hook(module: Any, *args: Any) -> None:
        way(cache, module.layer_idx)

    attentions = [layer.self_attn for layer in model.model.layers]
    if way in BEFORE:
        handles = [module.register_forward_pre_hook(hook) for module in attentions]
    else:
        handles = [module.register_forward_hook(hook) for module in attentions]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("way", [*AFTER, *BEFORE])
@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_written_by_hooks_of_a_forward(family: str, way: Any) -> None:
    logits = []
    stock, model = pair(family)
    for side in (stock, model):
        cache = hf_fastattn.PagedCache(side.config) if side is model else DynamicCache(config=side.config)
        # A layer that has written is there in the first forward, too.
        with hooked(side, cache, way) if way is own_newest else contextlib.nullcontext():
            prefilled(side, single(20), cache)
        with hooked(side, cache, way):
            logits.append(go_on(side, cache, None, 1))
        logits.append(go_on(side, cache, None, 4))
    torch.testing.assert_close(logits[2], logits[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[3], logits[1], rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


@pytest.mark.parametrize("way", [*AFTER, *BEFORE])
def test_written_by_hooks_of_a_call(way: Any) -> None:
    """Into the user's `DynamicCache`, at every token."""
    results = []
    stock, model = pair("llama")
    for side in (stock, model):
        cache = prefilled(side, single(20), DynamicCache(config=side.config))
        ids = torch.cat([single(20)["input_ids"], single(1, 3)["input_ids"]], 1)
        with hooked(side, cache, way):
            results.append((run(side, {"input_ids": ids}, 8, **{CACHE: cache}), cache.layers[2].values))
    assert torch.equal(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-3)
    assert_fast(model, held=None)


def test_a_past_whose_pages_others_share_is_refused() -> None:
    _, model = pair("llama")
    cache = prefilled(model, single(20), hf_fastattn.PagedCache(model.config))
    fork = hf_fastattn.fork(cache, [0])
    with (
        hooked(model, cache, later_layers_past),
        pytest.raises(RuntimeError, match="layer 2 of .* write them before the forward"),
    ):
        go_on(model, cache, None, 1)
    assert torch.equal(go_on(model, cache, None, 2), go_on(model, fork, None, 2))


@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen2_window"])
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}])
def test_written_while_drafts_are_taken_back(family: str, options: dict[str, Any]) -> None:
    if OLD and family != "llama":
        pytest.skip("stock cannot crop a cache with a sliding window in this version")
    batch = single(30)
    batch["input_ids"][:, 15:21] = batch["input_ids"][:, 9:15]
    results = []
    for side in pair(family):

        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            kwargs[CACHE].layers[module.layer_idx].values[:, :, -1] += 0.7

        for layer in side.model.layers:
            layer.self_attn.register_forward_hook(hook, with_kwargs=True)
        results.append(run(side, batch, 8, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("writes", [False, True])
def test_hidden_tokens_are_shown_to_hooks(writes: bool) -> None:
    """A user's cache with tokens that the mask of a later call hides, and a call after it that shows them."""
    found = []
    for side in pair("llama"):
        cache, seen = prefilled(side, single(20), DynamicCache(config=side.config)), []
        ids = torch.cat([single(20)["input_ids"], single(4, 3)["input_ids"]], 1)
        mask = torch.ones_like(ids)
        mask[:, 3:9] = 0

        def look(cache: Any, index: int, seen: list[Any] = seen) -> None:
            if writes:
                cache.layers[index].values[:, :, -1] += 0.7
            seen.append(cache.layers[index].values[:, :, 3:9].clone())

        with hooked(side, cache, look):
            out = run(side, {"input_ids": ids, "attention_mask": mask}, 6, **{CACHE: cache})
        held = [layer.values.clone() for layer in cache.layers]
        again = torch.cat([out, out[:, 5:8]], 1)
        last = run(side, {"input_ids": again, "attention_mask": torch.ones_like(again)}, 6, **{CACHE: cache})
        found.append((out, last, seen, held))
    (out, last, seen, held), ours = found
    assert torch.equal(ours[0], out) and torch.equal(ours[1], last)
    for states, want in zip([*ours[2], *ours[3]], [*seen, *held], strict=True):
        torch.testing.assert_close(states, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
@pytest.mark.parametrize("records", [False, True])
def test_what_hooks_see_of_a_cache(family: str, records: bool) -> None:
    """How long it is, and how long the keys of layers that have written and of those that have not."""
    seen = []
    for side in pair(family):
        cache: Any = DynamicCache(config=side.config)
        if hasattr(side, "_fastattn"):
            cache = hf_fastattn.PagedCache(side.config)
        prefilled(side, single(), cache)
        if records and not OLD:
            cache.activate_past_recording()
        notes: list[Any] = []

        def note(cache: Any, index: int, notes: list[Any] = notes) -> None:
            lengths = [(layer.get_seq_length(), tuple(layer.keys.shape)) for layer in cache.layers]
            notes.append((cache.get_seq_length(index), lengths, cache.layers[index].is_initialized))

        with hooked(side, cache, note):
            go_on(side, cache, None, 2)
        seen.append((notes, cache.is_initialized))
    assert seen[1] == seen[0]
