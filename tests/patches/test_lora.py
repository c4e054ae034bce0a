"""PEFT's LoRA, before and after the patch."""

from __future__ import annotations

import pytest
import torch

import hf_fastattn
from tests.patches.snapshots import UNLIKE, assert_patched_equals, generate, gradients, lora, snapshot
from tests.tools.models import assert_fast, padded_batch, pair, real_tokens, tiny


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("patch_first", [False, True])
def test_lora(family: str, patch_first: bool) -> None:
    plain = tiny(family)
    stock = lora(tiny(family))
    if patch_first:
        model = lora(hf_fastattn.patch(tiny(family)))
    else:
        model = hf_fastattn.patch(lora(tiny(family)))
    assert not torch.equal(generate(stock), generate(plain))
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model.get_base_model(), real_tokens(padded_batch()))
    with model.disable_adapter():
        assert torch.equal(generate(model), generate(plain))
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model.get_base_model(), real_tokens(padded_batch()))


def test_lora_is_unpatched_without_a_trace() -> None:
    model = lora(tiny("llama"))
    before = snapshot(model)
    hf_fastattn.patch(model)
    generate(model)
    hf_fastattn.unpatch(model)
    assert snapshot(model) == before


def test_lora_taken_off_while_patched() -> None:
    stock, model = pair("llama")
    wrapped = lora(model)
    generate(wrapped)
    unwrapped = wrapped.unload()
    assert_patched_equals(stock, unwrapped)


def test_gradients_of_lora_equal_stock() -> None:
    expected = gradients(lora(tiny("qwen2")).train())
    ours = gradients(hf_fastattn.patch(lora(tiny("qwen2"))).train())
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name
