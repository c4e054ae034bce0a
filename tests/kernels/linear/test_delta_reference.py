"""The reference of Gated DeltaNet: chunks against steps, and both against Transformers' own functions."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from hf_fastattn.kernels.linear.delta_parts import DeltaInputs, StepStates
from hf_fastattn.kernels.linear.delta_reference import by_chunks, convolved, delta_prefill, delta_step, gated
from tests.kernels.linear.delta_cases import KERNEL, cloned, in_dtype, parts, states

FP64 = torch.float64


def token_by_token(x: DeltaInputs, weights, length: int) -> tuple[torch.Tensor, StepStates]:
    """A single row, one step after the other."""
    heads, dk, (shared, dv) = x.q.shape[1], x.q.shape[2], x.v.shape[2:]
    conv = x.q.new_zeros(1, heads * (2 * dk + shared * dv), KERNEL)
    recurrent = x.q.new_zeros(1, heads * shared, dk, dv)
    slot = torch.zeros(1, dtype=torch.int32)
    held, outs = StepStates(conv, recurrent, slot, conv, recurrent, slot, None), []
    for token in range(length):
        outs.append(delta_step(DeltaInputs(*(part[token : token + 1] for part in x)), weights, held))
    return torch.cat(outs), held


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 5], [63, 64, 65], [3, 130]])
def test_chunks_give_what_steps_give(lengths: list[int], interleaved: bool) -> None:
    x, weights = in_dtype(*parts(sum(lengths), interleaved=interleaved), FP64)
    out, conv, recurrent = delta_prefill(x, weights, lengths)
    start = 0
    for row, length in enumerate(lengths):
        single = DeltaInputs(*(part[start : start + length] for part in x))
        want, held = token_by_token(single, weights, length)
        torch.testing.assert_close(out[start : start + length], want)
        torch.testing.assert_close(recurrent[row], held.recurrent[0])
        torch.testing.assert_close(conv[row], held.conv[0])
        start += length


def test_a_prompt_in_two_parts() -> None:
    x, weights = in_dtype(*parts(70), FP64)
    whole, conv, recurrent = delta_prefill(x, weights, [70])
    first, *held = delta_prefill(DeltaInputs(*(part[:3] for part in x)), weights, [3])
    second, *held = delta_prefill(DeltaInputs(*(part[3:] for part in x)), weights, [67], *held)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(held[0], conv)
    torch.testing.assert_close(held[1], recurrent)


def test_the_rule_is_transformers_own() -> None:
    x, weights = parts(150)
    mixed = torch.randn(150, x.channels.shape[1], generator=torch.Generator().manual_seed(3))
    taken = gated(x, weights, mixed)
    start = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(4))
    out, state = by_chunks(type(taken)(*(part[None] for part in taken)), start)
    # Transformers scales the queries by itself.
    arguments = {"query": taken.q[None] * 8**0.5, "key": taken.k[None], "value": taken.v[None]}
    more = {"g": taken.g[None], "beta": taken.beta[None], "initial_state": start, "output_final_state": True}
    for rule in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        want, want_state = rule(**arguments, **more)
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state, want_state, rtol=1e-3, atol=1e-4)


def test_a_ring_holds_what_states_in_order_hold() -> None:
    x, weights = in_dtype(*parts(3), FP64)
    ordered = states(x, [2, -1, 0], 4)
    lengths = [5, 9, 8]
    ring = cloned(states(x, [2, -1, 0], 4, lengths=lengths))
    for row, slot in ((0, 2), (2, 0)):
        ring.conv[slot] = ordered.conv[slot].roll(lengths[row] % KERNEL, -1)
    out = delta_step(x, weights, ordered)
    torch.testing.assert_close(delta_step(x, weights, ring), out)
    assert bool((out[1] == 0).all())
    for row, slot in ((0, 2), (2, 0)):
        # The oldest one lies behind the newest.
        assert torch.equal(ring.conv[slot].roll(-(lengths[row] + 1) % KERNEL, -1), ordered.conv_out[slot])
        assert torch.equal(ring.recurrent[slot], ordered.recurrent_out[slot])
    assert bool(ring.recurrent[[1, 3]].isnan().all()) and bool(ordered.recurrent_out[[1, 3]].isnan().all())


def test_convolution_is_causal_and_newest_last() -> None:
    weight = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    inputs = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert convolved(inputs, weight).item() == pytest.approx(4321.0)
    assert math.isclose(float(convolved(-inputs / 4321, weight)), -1 / (1 + math.e), rel_tol=1e-5)
