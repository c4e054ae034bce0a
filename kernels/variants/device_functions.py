"""What PyTorch's operators mean where Triton's differ: `@triton.jit` functions that translated hooks call."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter runs no assembly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def floor_divide(a, b):
    """PyTorch's `//` of integers, which rounds down; Triton's rounds towards zero."""
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def floor_remainder(a, b):
    """PyTorch's `%` of integers, with the sign of `b`; Triton's has that of `a`."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floor_remainder_float(a, b):
    """PyTorch's `%` of floating-point numbers, with the sign of `b`."""
    return a - tl.floor(a / b) * b


@triton.jit
def truncate(x):
    """`x` without its fraction."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_to_even(x):
    """`x` to the nearest integer, ties to the even one, as `torch.round`."""
    lower = tl.floor(x)
    rest = x - lower
    odd = lower - 2 * tl.floor(lower * 0.5) != 0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), lower + 1, lower)


@triton.jit
def tanh(x):
    """Without overflow, and with the relative error of fp32 near 0 (a polynomial fit of `(tanh(x) / x - 1) / x^2`)."""
    x2 = x * x
    fitted = 0.13331915 + x2 * (-0.053783294 + x2 * (0.020794617 + x2 * -0.005893945))
    return tl.where(x2 < 0.36, x + x * (x2 * (-0.333333 + x2 * fitted)), 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x)))


@triton.jit
def tanh_to_16_bits(x):
    """By the hardware's instruction, of a relative error of 2^-11: a quarter of that of a score rounded to bf16."""
    if INTERPRETED:
        return tanh(x)
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log1p(x):
    """`log(1 + x)`, also where 1 + x rounds (Kahan's correction)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def element(x, index):
    """Columns `index: [.., BLOCK]` of `x: [M, BLOCK_D]`; which one an index outside of the tile gives does not matter."""
    index = tl.minimum(tl.maximum(index, 0), x.shape[1] - 1)
    return tl.gather(x, tl.broadcast_to(index, (x.shape[0], index.shape[1])), 1)
