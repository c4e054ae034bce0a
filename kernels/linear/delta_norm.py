"""The gated RMSNorm of Gated DeltaNet: `weight * RMSNorm(x) * silu(z)` of every token and value head, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of
from hf_fastattn.kernels.quick_launch import launch

# Elements of a program.
ELEMENTS = 2048


@triton.jit
def gated_norm_kernel(
    x_ptr, z_ptr, weight_ptr, eps, total, stride_zt, stride_zh, stride_zr,
    HEADS: tl.constexpr, R: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS of the `total` rows of `[T * HEADS, DIM]`; written over x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    ok = (row < total)[:, None]
    at = row[:, None] * DIM + d[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0)  # [ROWS, DIM]
    token, head = row // HEADS, row % HEADS
    z_at = token * stride_zt + head // R * stride_zh + head % R * stride_zr
    z = tl.load(z_ptr + z_at[:, None] + d[None, :], mask=ok, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / DIM + eps)
    normed = tl.load(weight_ptr + d)[None, :] * (wide * inverse[:, None]).to(x.dtype)
    tl.store(x_ptr + at, (normed.to(tl.float32) * (z * tl.sigmoid(z))).to(x.dtype), mask=ok)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of `x: [T, HV, DV]`, contiguous, which it is written over; as `[T, HV * DV]`.

    Args:
        z: `[T, HK, R, DV]`, contiguous in its last dimension.
        weight: `[DV]`, DV a power of two.
    """
    tokens, heads, dim = x.shape
    rows = max(ELEMENTS // dim, 1)
    with on_device_of(x):
        launch(
            gated_norm_kernel, (-(-tokens * heads // rows),), (x, z, weight, eps, tokens * heads, *z.stride()[:3]),
            dict(HEADS=heads, R=z.shape[2], DIM=dim, ROWS=rows, num_warps=4),
        )  # fmt: skip
    return x.view(tokens, -1)
