"""[residual +] RMSNorm in one launch.

RMSNorm (Zhang and Sennrich, 2019): `s = x + residual`, `y = s / sqrt(mean(s^2) + eps) * weight`. The sum is rounded to
the dtype of the residual before it is squared, as Transformers does; all else is fp32 with one rounding at the end. A
program takes one row. Under autocast the residual is fp32, x what a product gave in 16 bits, and y again what the next
product takes. Of two ranks x may be this one's part of a sum and `other` the other's: their sum is rounded as an all-reduce
would. The plain PyTorch version is `reference.add_rms_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.quick_launch import launch

MAX_HIDDEN = 16_384
# So many that each thread makes one vector load of 16-bit elements, up to 16 warps.
ELEMENTS_PER_WARP = 256


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, other_ptr, weight_ptr, out_ptr, sum_ptr, eps, stride_x, stride_r,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, UNIT_OFFSET: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of `[T, HIDDEN]`; `residual_ptr` and `sum_ptr` are None in a norm without residual.

    `other_ptr`: another part of x, contiguous, or None.
    """
    column = tl.arange(0, BLOCK)  # [BLOCK], as all below
    ok = column < HIDDEN
    row = tl.program_id(0).to(tl.int64)
    # The next launch prefetches its weights once it may start. With a single row that competes with the loads of this norm,
    # for which the next launch waits; with more rows its products gain more from the prefetch.
    if OVERLAP:
        if tl.num_programs(0) > 1:
            gdc_launch_dependents()
    if OVERLAP and not SETTLED:
        gdc_wait()
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0)
    if OVERLAP and SETTLED:
        gdc_wait()
    x = tl.load(x_ptr + row * stride_x + column, mask=ok, other=0.0)
    if other_ptr is not None:
        other = tl.load(other_ptr + row * HIDDEN + column, mask=ok, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(x_ptr.dtype.element_ty)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * stride_r + column, mask=ok, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * HIDDEN + column, x, mask=ok)
    if OVERLAP:
        gdc_launch_dependents()
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    scale = weight.to(tl.float32)
    if UNIT_OFFSET:
        scale += 1.0
    tl.store(out_ptr + row * HIDDEN + column, (wide * inverse * scale).to(out_ptr.dtype.element_ty), mask=ok)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    weights_settled: bool,
    dtype: torch.dtype | None,
    other: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    if x.ndim != 2 or x.dtype not in DTYPES or x.stride(-1) != 1 or not 0 < x.shape[-1] <= MAX_HIDDEN:
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()}, {x.dtype}, must be [T, hidden] with hidden from 1 to "
            f"{MAX_HIDDEN}, contiguous in its last dimension, of a dtype among {DTYPES}"
        )
    tokens, hidden = x.shape
    if weight.shape != (hidden,) or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} must be [hidden] = {[hidden]} and contiguous")
    stream = x if residual is None else residual
    if stream.shape != x.shape or stream.dtype not in (x.dtype, torch.float32) or stream.stride(-1) != 1:
        raise ValueError(
            f"residual {tuple(stream.shape)}, {stream.dtype}, must be as x, {tuple(x.shape)}, {x.dtype}, or in fp32"
        )
    if other is not None and (other.shape != x.shape or other.dtype is not x.dtype or not other.is_contiguous()):
        raise ValueError(f"other {tuple(other.shape)}, {other.dtype}, must be as x, {tuple(x.shape)}, {x.dtype}, contiguous")
    dtype = dtype or stream.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} must be among {DTYPES}")
    if out is None:
        out = torch.empty((tokens, hidden), dtype=dtype, device=x.device)
    elif out.shape != x.shape or out.dtype is not dtype or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)}, {out.dtype}, must be {tuple(x.shape)}, {dtype}, contiguous")
    total = None if residual is None else torch.empty((tokens, hidden), dtype=stream.dtype, device=x.device)
    if not tokens:
        return out, total
    block = power_of_2(hidden)
    overlap = overlaps_launches(arch_of(x.device))
    with on_device_of(x):
        launch(
            rms_norm_kernel, (tokens,),
            (x, residual, other, weight, out, total, eps, x.stride(0), 0 if residual is None else residual.stride(0)),
            dict(
                HIDDEN=hidden, BLOCK=block, UNIT_OFFSET=unit_offset, SETTLED=weights_settled, OVERLAP=overlap,
                num_warps=min(max(block // ELEMENTS_PER_WARP, 1), 16), **({"launch_pdl": True} if overlap else {}),
            ),
        )  # fmt: skip
    return out, total


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    weights_settled: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """RMSNorm of every row; see `add_rms_norm`."""
    return _launch(x, None, weight, eps, unit_offset, weights_settled, dtype, None, out)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    weights_settled: bool = False,
    dtype: torch.dtype | None = None,
    other: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of `x + residual`, and that sum.

    Args:
        x: `[T, hidden]` bf16, fp16 or fp32, hidden up to 16384; any stride between rows.
        residual: likewise, in the dtype of x or fp32.
        weight: `[hidden]`.
        eps: added to the mean square.
        unit_offset: multiply by `1 + weight`.
        weights_settled: no launch that may still be running writes `weight`, so it is read before these have ended.
        dtype: of the normalised rows; by default that of the residual.
        other: added to x first, and the sum rounded; of the shape and dtype of x, contiguous.
        out: `[T, hidden]` for the normalised rows, contiguous.

    Returns:
        The normalised rows and the sums, the latter in the dtype of the residual, both `[T, hidden]`, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    out, total = _launch(x, residual, weight, eps, unit_offset, weights_settled, dtype, other, out)
    assert total is not None
    return out, total
