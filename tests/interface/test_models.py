"""Models without a family of ours give stock's outputs, and our kernels computed them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import hf_fastattn
from hf_fastattn import interface
from hf_fastattn.dense.causal_layout import CausalLayout
from hf_fastattn.interface import counters
from hf_fastattn.transformers_version import CACHE
from tests.interface.tiny import CALLS, MODELS, NEW, assert_ours, build_pair, tokens
from tests.tools.models import OLD, noisy, padded_batch, tiny


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_stock(name: str, call: str) -> None:
    stock, model = build_pair(name)
    want = tokens(stock, padded_batch(), **CALLS[call])
    assert not sum(counters.kernels.values())
    assert torch.equal(tokens(model, padded_batch(), **CALLS[call]), want)
    assert_ours(3 * NEW)


@pytest.mark.parametrize("family, layers", [("qwen2_moe", 3), ("qwen3_next", 2), ("ministral3", 3), ("mistral_window", 3)])
def test_windows_experts_and_linear_layers(family: str, layers: int) -> None:
    stock, model = tiny(family), tiny(family)
    model.set_attn_implementation("fastattn")
    assert torch.equal(tokens(model, padded_batch()), tokens(stock, padded_batch()))
    assert_ours(layers * NEW)


def test_a_patched_model() -> None:
    stock, model = build_pair("llama")
    hf_fastattn.patch(model)
    want = tokens(stock, padded_batch())
    assert torch.equal(tokens(model, padded_batch()), want)
    assert not counters.kernels and not counters.fallbacks
    hf_fastattn.unpatch(model)
    assert torch.equal(tokens(model, padded_batch()), want)
    assert_ours(3 * NEW)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_other_loops(name: str) -> None:
    stock, model = build_pair(name)
    batch, one = padded_batch(), {"input_ids": padded_batch(1, 50)["input_ids"]}
    assistant = noisy(copy.deepcopy(stock))
    for inputs, options in (
        (one, {}),
        (batch, {"prefill_chunk_size": 7}),
        (one, {"prompt_lookup_num_tokens": 3}),
        (one, {"assistant_model": assistant}),
    ):
        if OLD and name != "llama" and inputs is one and options:
            # Stock loses keys, or fails, when it crops a full window.
            continue
        want = tokens(stock, inputs, **options)
        counters.reset()
        assert torch.equal(tokens(model, inputs, **options), want), options
        assert_ours()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
@pytest.mark.parametrize("length", [12, 37])
def test_static_cache(name: str, length: int) -> None:
    stock, model = build_pair(name)
    batch = padded_batch(3, length)
    want = tokens(stock, batch, cache_implementation="static")
    assert torch.equal(tokens(model, batch, cache_implementation="static"), want)
    # Its decode steps come with a 4-D mask, which says where the cache is filled.
    assert_ours(3, fallbacks=3 * (NEW - 1))
    assert list(counters.fallbacks) == ["a mask that is not plain causal or sliding"]


def test_what_a_static_cache_has_room_for_is_not_read() -> None:
    stock, model = build_pair("llama")
    ids = padded_batch(2, 20)["input_ids"]
    with torch.no_grad():
        want = stock(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=64)
        first = model(ids[:, :11], **{CACHE: cache}).logits
        for layer in cache.layers:
            layer.keys[:, :, 11:] = math.nan
            layer.values[:, :, 11:] = math.nan
        rest = model(ids[:, 11:], **{CACHE: cache}).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), want, atol=1e-3, rtol=1e-4)
    assert_ours(6)


@pytest.mark.parametrize(
    "fault",
    ["window + 1", "window - 1", "one more key", "one key less", "no softcap", "no sinks", "scale"],
)
def test_the_models_would_notice(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = build_pair({"no softcap": "gemma2", "no sinks": "gpt_oss"}.get(fault, "phi3"))

    def faulty(q: Tensor, k: Tensor, v: Tensor, layout: CausalLayout, *, scale: float, **options: Any) -> Tensor:
        wider = {"window + 1": 1, "window - 1": -1}.get(fault, 0)
        shift = {"one more key": -1, "one key less": 1}.get(fault, 0)
        starts = (layout.starts + shift * (layout.starts > 0)).int()
        window = None if layout.window is None else layout.window + wider
        layout = CausalLayout.of_starts(starts, layout.padded, layout.filled, layout.kv_length, window)
        drop = {"no softcap": "softcap", "no sinks": "sinks"}.get(fault)
        options = {name: None if name == drop else value for name, value in options.items()}
        return right(q, k, v, layout, scale=scale * (1.1 if fault == "scale" else 1), **options)

    right = interface.dense_attention
    monkeypatch.setattr(interface, "dense_attention", faulty)
    assert not torch.equal(tokens(model, padded_batch()), tokens(stock, padded_batch()))


def test_the_layout_is_made_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = CausalLayout.plan

    def counted(self: CausalLayout, queries: int, row_step: int) -> Any:
        found = plan(self, queries, row_step)
        made.append(found)
        return found

    monkeypatch.setattr(CausalLayout, "plan", counted)
    _, model = build_pair("gpt_oss", num_hidden_layers=6)
    tokens(model, padded_batch(), max_new_tokens=5)
    # One for the full and one for the sliding layers.
    assert len(made) == 6 * 5 and len({id(found) for found in made}) == 2 * 5


@pytest.mark.interpreter
def test_a_model_on_the_triton_path() -> None:
    stock, model = build_pair("gpt_oss", num_hidden_layers=2)
    options = {"max_new_tokens": 4}
    assert torch.equal(tokens(model, padded_batch(), **options), tokens(stock, padded_batch(), **options))
    assert_ours(2 * 4, "triton")
