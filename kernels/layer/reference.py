"""The parts of a decoder layer around attention, in plain PyTorch: norms, activation, linear products.

Every step is rounded in the dtype of its input, as Transformers rounds it; fp64 inputs give the oracle of the tests. Under
autocast a product rounds its weights to the dtype of x, and what is added to an fp32 residual is widened. The kernels in
`norm.py`, `activation.py` and `matvec.py` compute the same in fp32 and round once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of `x + other + residual`, rounded to `dtype` if given, and that sum, both `[T, hidden]`."""
    total = residual + (x if other is None else x + other)
    return rms_norm(total, weight, eps, unit_offset).to(dtype or total.dtype), total


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` with `silu(g) = g / (1 + exp(-g))`."""
    return functional.silu(gate) * up


def matvec(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    residual: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`x W^T + b` for every weight `[N_i, K]`, with the residual added last, if there is one."""
    added = [bias.to(x.dtype) for bias in biases] if biases else [None] * len(weights)
    outs = [functional.linear(x, weight.to(x.dtype), bias) for weight, bias in zip(weights, added, strict=True)]
    return tuple(outs if residual is None else [residual + out for out in outs])


def gate_up_silu(x: Tensor, w_gate: Tensor, w_up: Tensor) -> Tensor:
    """`silu(x Wg^T) * (x Wu^T)`."""
    return silu_and_mul(*matvec(x, (w_gate, w_up)))


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """RMSNorm over the last dimension (Zhang and Sennrich, 2019), as Transformers rounds it.

    With `n = x * rsqrt(mean(x^2) + eps)`, all of it in fp32 (fp64 for fp64 input), the result is
    `weight * round(n)`: n is rounded to the dtype of x first, and multiplied in that dtype. With `unit_offset` it is
    `round(n * (1 + weight))`: the weight is widened, multiplied in fp32, and rounded to the dtype of x once.
    """
    wide = x.float() if x.dtype != torch.float64 else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (wide * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * wide.to(x.dtype)


def low_rank(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """LoRA's `y + scale (x A^T) B^T` as PEFT rounds it: x in the dtype of A, the sum in the wider dtype, then that of y."""
    return (y + functional.linear(functional.linear(x.to(a.dtype), a), b) * scale).to(y.dtype)
