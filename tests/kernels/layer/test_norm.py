"""[residual +] RMSNorm in one kernel against the same steps in PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.layer import norm, reference
from tests.kernels.cases import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def rows(tokens: int, width: int, dtype: torch.dtype, device: str, seed: int, strided: bool = False) -> Tensor:
    """Random `[tokens, width]`; strided: NaN stands between the rows."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    if not strided:
        return x
    wide = torch.full((tokens, width + 24), math.nan, dtype=dtype, device=device)
    wide[:, 8 : 8 + width] = x
    return wide[:, 8 : 8 + width]


def check(
    tokens: int,
    hidden: int,
    dtype: torch.dtype = BF16,
    *,
    unit_offset: bool = False,
    strided: bool = False,
    settled: bool = False,
    factor: float = 1.0,
    device: str = "cpu",
) -> None:
    """Norm and sum; the sum bit for bit."""
    x = rows(tokens, hidden, dtype, device, 1, strided) * factor
    residual = rows(tokens, hidden, dtype, device, 2, strided) * factor
    weight = rows(1, hidden, dtype, device, 3)[0]
    options = {"unit_offset": unit_offset}
    got, total = norm.add_rms_norm(x, residual, weight, 1e-5, weights_settled=settled, **options)
    alone = norm.rms_norm(x, weight, 1e-5, weights_settled=settled, **options)
    plain, plain_total = reference.add_rms_norm(x, residual, weight, 1e-5, **options)
    assert got.dtype == alone.dtype == dtype
    assert torch.equal(total, plain_total)
    want, _ = reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5, **options)
    assert_close("norm of the sum", got, plain, want)
    want = reference.rms_norm(x.double(), weight.double(), 1e-5, unit_offset)
    assert_close("norm", alone, reference.rms_norm(x, weight, 1e-5, unit_offset), want)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_an_fp32_residual(dtype):
    """Under autocast: what a product gave is added to an fp32 residual, and the norm is rounded for the next product."""
    x, residual, weight = rows(3, 100, dtype, "cpu", 1), rows(3, 100, FP32, "cpu", 2), rows(1, 100, FP32, "cpu", 3)[0]
    got, total = norm.add_rms_norm(x, residual, weight, 1e-5, dtype=dtype)
    plain, plain_total = reference.add_rms_norm(x, residual, weight, 1e-5, dtype=dtype)
    want, _ = reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    assert got.dtype == dtype and total.dtype == FP32 and torch.equal(total, plain_total)
    assert_close("norm of the sum", got, plain, want)
    alone = norm.rms_norm(residual, weight, 1e-5, dtype=dtype)
    want = reference.rms_norm(residual.double(), weight.double(), 1e-5, False)
    assert_close("norm", alone, reference.rms_norm(residual, weight, 1e-5, False).to(dtype), want)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("stream", [None, FP32])
def test_two_parts(dtype, stream):
    """A sum over two ranks is rounded before it is added to the residual, as an all-reduce would round it."""
    check_parts(7, 200, dtype, stream or dtype, "cpu")


def check_parts(tokens, hidden, dtype, stream, device):
    x, other = (rows(tokens, hidden, dtype, device, seed) for seed in (1, 2))
    residual, weight = rows(tokens, hidden, stream, device, 3), rows(1, hidden, stream, device, 4)[0]
    got, total = norm.add_rms_norm(x, residual, weight, 1e-5, dtype=dtype, other=other)
    plain, plain_total = reference.add_rms_norm(x, residual, weight, 1e-5, dtype=dtype, other=other)
    assert torch.equal(total, plain_total) and not torch.equal(total, residual + x)
    room = torch.full_like(got, float("nan"))
    again, _ = norm.add_rms_norm(x, residual, weight, 1e-5, dtype=dtype, other=other, out=room)
    assert again is room and torch.equal(room, got)
    assert torch.equal(norm.rms_norm(x, weight, 1e-5, out=room.zero_()), norm.rms_norm(x, weight, 1e-5))
    want, _ = reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5, other=other.double())
    assert_close("norm of the sum", got, plain, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (2, 896), (3, 63), (8, 1), (16, 1000)])
def test_shapes(dtype, unit_offset, tokens, hidden):
    check(tokens, hidden, dtype, unit_offset=unit_offset)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{"strided": True}, {"settled": True}, {"factor": 100.0}, {"factor": 1e-4}])
def test_options(options):
    check(5, 320, **options)


@pytest.mark.interpreter
def test_no_tokens():
    check(0, 64)


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="hidden from 1 to 16384"):
        norm.rms_norm(torch.zeros(1, 16_385), torch.ones(16_385), 1e-5)
    with pytest.raises(ValueError, match="weight"):
        norm.rms_norm(x, torch.ones(63), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        norm.add_rms_norm(x, x[:1], torch.ones(64), 1e-5)
    with pytest.raises(ValueError, match="other"):
        norm.add_rms_norm(x, x, torch.ones(64), 1e-5, other=x[:1])
    with pytest.raises(ValueError, match="out"):
        norm.rms_norm(x, torch.ones(64), 1e-5, out=x[:1])
    with pytest.raises(ValueError, match="contiguous"):
        norm.rms_norm(x.T, torch.ones(2), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "dtype", "unit_offset"),
    [(896, BF16, False), (1152, FP16, True), (4096, BF16, False), (4096, FP32, False), (16384, BF16, True)],
)
def test_sweep(hidden, dtype, unit_offset):
    for tokens in (1, 2, 5, 16, 63, 1000, 8192):
        check(tokens, hidden, dtype, unit_offset=unit_offset, strided=tokens % 2 == 1, settled=True, device="cuda")


@pytest.mark.gpu
def test_two_parts_gpu():
    for tokens, hidden in ((1, 896), (63, 4096), (4096, 4096), (1000, 16384)):
        check_parts(tokens, hidden, BF16, BF16, "cuda")
