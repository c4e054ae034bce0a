"""Models in wrappers, models that cannot generate, and modules and configurations that tools exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import hf_fastattn
from tests.patches.snapshots import assert_patched_equals, generate
from tests.tools.models import assert_fast, padded_batch, pair, real_tokens, tiny


def test_a_compiled_model() -> None:
    stock, inner = tiny("llama"), tiny("llama")
    compiled: Any = torch.compile(inner, backend="eager")
    assert hf_fastattn.patch(compiled) is compiled
    assert torch.equal(generate(compiled), generate(stock))
    assert_fast(compiled, real_tokens(padded_batch()))
    hf_fastattn.unpatch(compiled)
    assert type(inner) is type(stock) and torch.equal(generate(compiled), generate(stock))


def test_a_data_parallel_wrapper() -> None:
    stock, inner = tiny("qwen2"), tiny("qwen2")
    hf_fastattn.patch(torch.nn.DataParallel(inner))
    assert_patched_equals(stock, inner)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, None])
def test_without_generate_the_error_names_the_way(kind: Any) -> None:
    config = tiny("llama").config
    model = torch.nn.Sequential(AutoModel.from_config(config)) if kind is None else kind.from_config(config)
    with pytest.raises(TypeError, match=rf"(?s)model is a {type(model).__name__}.*register.*attn_implementation='fastattn'"):
        hf_fastattn.patch(model)


def test_norms_that_peft_tunes() -> None:
    """LN tuning puts a module of its own in the place of qk-norm."""
    peft = pytest.importorskip("peft")
    stock, model = pair("qwen3")
    sides = []
    for side in (stock, model):
        wrapped = peft.get_peft_model(side, peft.LNTuningConfig(target_modules=["q_norm", "k_norm"])).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "ln_tuning" in name:
                    parameter.mul_(1.5)
        sides.append(generate(wrapped))
    assert torch.equal(*sides)
    assert_fast(model, real_tokens(padded_batch()))


@pytest.mark.parametrize("family", ["mistral_window", "qwen2_window"])
def test_a_window_changed_after_the_patch(family: str) -> None:
    stock, model = pair(family)
    assert_patched_equals(stock, model)
    before = generate(stock)
    for side in (stock, model):
        side.config.sliding_window = 5
    assert not torch.equal(generate(stock), before)
    assert_patched_equals(stock, model)
