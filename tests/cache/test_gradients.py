"""Gradients through the keys and values of a cache, which pages do not keep: such forwards run on Transformers' layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import pair, single


def through_two_forwards(model: Any, cache: Any) -> torch.Tensor:
    model(**single(20), **{CACHE: cache})
    weight: torch.Tensor = model.model.layers[1].self_attn.k_proj.weight
    return weight


def through_embeddings(model: Any, cache: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 20, model.config.hidden_size, generator=generator).requires_grad_()
    model(inputs_embeds=embeds, **{CACHE: cache})
    return embeds


def held(model: Any, cache: Any) -> Any:
    with torch.no_grad():
        model(**single(20), **{CACHE: cache})
    return cache.layers[1]


def of_keys_that_were_read(model: Any, cache: Any) -> torch.Tensor:
    keys: torch.Tensor = held(model, cache).keys.requires_grad_()
    return keys


def of_what_was_added_in_place(model: Any, cache: Any) -> torch.Tensor:
    amount = torch.tensor(0.3, requires_grad=True)
    held(model, cache).values[:, :, -1] += amount
    return amount


def of_what_was_set(model: Any, cache: Any) -> torch.Tensor:
    amount = torch.tensor(0.3, requires_grad=True)
    layer = held(model, cache)
    layer.values = layer.values * amount
    return amount


WAYS: dict[str, Callable[[Any, Any], torch.Tensor]] = {
    way.__name__: way
    for way in (
        through_two_forwards, through_embeddings, of_keys_that_were_read, of_what_was_added_in_place, of_what_was_set,
    )
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_through_a_cache(way: str, frozen: bool) -> None:
    if frozen and way == "through_two_forwards":
        pytest.skip("a frozen weight has no gradient")
    stock, model = pair("llama")
    found = []
    for side, cache in ((stock, DynamicCache(config=stock.config)), (model, hf_fastattn.PagedCache(model.config))):
        side.requires_grad_(not frozen)
        source = WAYS[way](side, cache)
        side(input_ids=single(2, 9)["input_ids"], **{CACHE: cache}).logits.pow(2).mean().backward()
        found.append(source.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert any("gradients" in reason for reason in hf_fastattn.report(model).last_call.fallbacks)
