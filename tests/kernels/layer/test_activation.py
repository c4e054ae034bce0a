"""`silu(gate) * up` in one kernel against PyTorch."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.layer import activation, reference
from tests.kernels.cases import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(tokens: int, width: int, dtype: torch.dtype = BF16, *, fused: bool = False, device: str = "cpu") -> None:
    generator = torch.Generator(device).manual_seed(tokens + width)
    both = (4 * torch.randn(tokens, 2 * width, generator=generator, device=device)).to(dtype)
    gate, up = both.chunk(2, -1)
    if not fused:
        gate, up = gate.contiguous(), up.contiguous()
    got = activation.silu_and_mul(gate, up)
    assert got.dtype == dtype and got.is_contiguous()
    want = reference.silu_and_mul(gate.double(), up.double())
    assert_close("product", got, reference.silu_and_mul(gate, up), want)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(0, 64), (1, 1), (1, 4864), (2, 1023), (3, 1025), (16, 896)])
def test_shapes(dtype, fused, tokens, width):
    check(tokens, width, dtype, fused=fused)


@pytest.mark.interpreter
def test_extreme_gates():
    gate = torch.tensor([[-1e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e4]])
    torch.testing.assert_close(activation.silu_and_mul(gate, torch.ones(1, 8)), torch.nn.functional.silu(gate))


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="of one dtype"):
        activation.silu_and_mul(x, x.half())
    with pytest.raises(ValueError, match="contiguous"):
        activation.silu_and_mul(x.T, x.T)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_sweep(dtype):
    for tokens in (1, 2, 5, 16, 63, 1000):
        for width in (4864, 8960, 11008, 14336, 1001):
            check(tokens, width, dtype, fused=tokens % 2 == 1, device="cuda")
