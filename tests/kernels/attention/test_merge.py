"""Merging of attention states against the state over all keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.attention import softmax_state
from hf_fastattn.kernels.attention.merge import merge_states
from tests.kernels.cases import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def states(*shape: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Two states; in the first three rows the first, the second or both are empty, the fourth weighs one side only."""
    generator = torch.Generator(device).manual_seed(math.prod(shape))
    outs = torch.randn(2, *shape, generator=generator, device=device).to(dtype)
    lses = torch.randn(2, *shape[:-1], generator=generator, device=device) * 3
    for side, row in ((0, 0), (1, 1), (0, 2), (1, 2)):
        outs[side].flatten(0, -2)[row] = 0
        lses[side].view(-1)[row] = -math.inf
    lses[0].view(-1)[3] = 200.0
    return [outs[0], lses[0], outs[1], lses[1]]


def check(parts: list[Tensor]) -> None:
    got, got_lse = merge_states(*parts)
    want, want_lse = softmax_state.merge_states(*(part.double() for part in parts))
    plain, _ = softmax_state.merge_states(*parts)
    assert got.dtype == parts[0].dtype and got_lse.dtype == torch.float32
    assert_close("output", got, plain, want)
    torch.testing.assert_close(got_lse.double(), want_lse, atol=1e-5, rtol=1e-6)
    assert not got.flatten(0, -2)[2].any() and got_lse.view(-1)[2] == -math.inf


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [(9, 5, 16), (17, 1, 80), (4, 64), (3, 7, 256)])
def test_merge(dtype, shape):
    check(states(*shape, dtype=dtype, device="cpu"))


@pytest.mark.interpreter
def test_merge_of_strided_states():
    out_a, lse_a, out_b, lse_b = states(8, 4, 32, dtype=BF16, device="cpu")
    wide = torch.full((8, 4, 48), math.nan, dtype=BF16)
    wide[..., :32] = out_a
    turned = lse_b.t().contiguous().t()
    check([wide[..., :32], lse_a, out_b.transpose(0, 1).contiguous().transpose(0, 1), turned])


@pytest.mark.interpreter
def test_shapes_that_do_not_fit_are_refused():
    out, lse = torch.zeros(3, 2, 16), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="lse_a"):
        merge_states(out, lse[:2], out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "dtype"), [(64, BF16), (128, BF16), (80, FP16), (256, FP16), (128, FP32)])
def test_sweep(dim, dtype):
    for tokens in (1, 2, 17, 63, 1000, 5000):
        check(states(tokens, 8, dim, dtype=dtype, device="cuda"))
