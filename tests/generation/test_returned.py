"""What `return_dict_in_generate` returns: scores, logits, states, attentions, of each step and layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from tests.generation.calls import SAMPLING, Batch, assert_close, run
from tests.tools.models import CORE, assert_fast, padded_batch, pair, real_tokens


def assert_same_steps(ours: Any, stock: Any, name: str, batch: Batch, copies: int = 1, rows_dim: int = 0) -> None:
    """Per step and layer the same tensors; where the first step's queries are padding, anything goes."""
    assert len(ours) == len(stock)
    for step, (our_layers, stock_layers) in enumerate(zip(ours, stock, strict=True)):
        if torch.is_tensor(our_layers):
            assert_close(our_layers, stock_layers, f"{name} of step {step}")
            continue
        assert len(our_layers) == len(stock_layers)
        for layer, (a, b) in enumerate(zip(our_layers, stock_layers, strict=True)):
            assert a.shape == b.shape, (name, step, layer, a.shape, b.shape)
            if step == 0:
                real = batch["attention_mask"].repeat_interleave(copies, 0).bool()
                a, b = (t.movedim(-2, 1)[real] for t in (a, b))
            assert_close(a, b, f"{name} of step {step}, layer {layer}")


RETURNED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_returned_scores_and_states(family: str, copies: int, beams: int) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    options: dict[str, Any] = {"num_beams": beams, "num_return_sequences": copies}
    if copies > 1 and beams == 1:
        options |= SAMPLING
    expected = run(stock, batch, 8, **RETURNED, **options)
    result = run(model, batch, 8, **RETURNED, **options)
    assert type(result) is type(expected) and result.keys() == expected.keys()
    assert torch.equal(result.sequences, expected.sequences)
    for name in ("scores", "logits", "hidden_states"):
        assert_same_steps(result[name], expected[name], name, batch, max(copies, beams))
    assert_fast(model, real_tokens(batch), shared=max(copies, beams) > 1, held=None)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("beams", [1, 2])
def test_returned_attentions_fall_back(family: str, beams: int) -> None:
    stock, model = pair(family, attn_implementation="eager")
    batch = padded_batch()
    options = {"output_attentions": True, "num_beams": beams, **RETURNED}
    expected, result = run(stock, batch, 8, **options), run(model, batch, 8, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert len(result.attentions) == 8 and len(result.attentions[0]) == 3
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert_same_steps(result[name], expected[name], name, batch, beams)
    call = hf_fastattn.report(model).last_call
    assert call.fallbacks and all("attention weights" in reason for reason in call.fallbacks)
