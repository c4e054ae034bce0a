"""What cannot be patched, or not so, is refused with a reason and left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

import hf_fastattn
from tests.patches.snapshots import assert_patched_equals, snapshot
from tests.tools.models import pair, tiny


def test_unknown_option() -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"(?s)page_sise.*page_size"):
        hf_fastattn.patch(model, page_sise=16)
    with pytest.raises(TypeError, match="page_sise"):
        with hf_fastattn.patched(model, page_sise=16):
            pass
    with pytest.raises(TypeError):
        hf_fastattn.patch(model, {"page_size": 16})
    with pytest.raises(TypeError):
        hf_fastattn.patch(model, hf_fastattn.FastAttnConfig(), page_size=16)
    assert snapshot(model) == before


@pytest.mark.parametrize("size", [0, -16, 3, 24, 2048])
def test_page_size_must_be_a_power_of_two(size: int) -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"(?s){size}.*power of two"):
        hf_fastattn.patch(model, page_size=size)
    assert snapshot(model) == before


@pytest.mark.parametrize("option", [{"backend": "cuda"}, {"sampling": "fast?"}, {"memory_limit": 0}, {"keep_memory": 2}])
def test_values_out_of_range(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        hf_fastattn.patch(tiny("llama"), **option)


def test_unsupported_model() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)gpt2.*llama"):
        hf_fastattn.patch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("thing", ["meta-llama/Llama-3.2-1B", torch.nn.Linear(2, 2), None])
def test_not_a_model(thing: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        hf_fastattn.patch(thing)


def test_a_dynamic_rope_is_right_or_refused() -> None:
    """`dynamic` RoPE recomputes its frequencies from the longest position, per forward."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    over = {"rope_parameters": rope, "max_position_embeddings": 40}
    stock, model = pair("llama", **over)
    assert_patched_equals(stock, model)


def test_forward_replaced_by_someone_else() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def traced(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    attention.forward = traced
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn"):
        hf_fastattn.patch(model)
    assert snapshot(model) == before


def test_layer_of_a_patched_model() -> None:
    donor = hf_fastattn.patch(tiny("llama"))
    model = tiny("llama")
    model.model.layers[2] = donor.model.layers[2]
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn"):
        hf_fastattn.patch(model)
    assert snapshot(model) == before
    hf_fastattn.unpatch(donor)
    assert_patched_equals(tiny("llama"), hf_fastattn.patch(model))


def test_copied_layer_of_a_patched_model_is_plain_or_refused() -> None:
    donor = hf_fastattn.patch(tiny("llama"))
    model = tiny("llama")
    model.model.layers[2] = copy.deepcopy(donor.model.layers[2])
    if "forward" in vars(model.model.layers[2].self_attn):
        with pytest.raises(ValueError, match=r"layers\.2\.self_attn"):
            hf_fastattn.patch(model)
    else:
        assert_patched_equals(tiny("llama"), hf_fastattn.patch(model))


def test_warns_outside_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.transformers_version.TESTED", ("5.1", "5.2"))
    with pytest.warns(UserWarning, match="tested with transformers >= 5.1 and < 5.2, this is 5"):
        hf_fastattn.patch(tiny("llama"))
