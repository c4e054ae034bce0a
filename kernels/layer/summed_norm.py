"""Sum over ranks, residual and RMSNorm in one launch, over memory that the GPUs of one host read from each other.

`s = sum over ranks of x_r + residual`, `y = s / sqrt(mean(s^2) + eps) * weight`. Each rank has written its x to its part of
symmetric memory; a program takes one row: it tells its counterparts on the other ranks that this rank's row is there, waits
for theirs, reads all of them, in the same order on every rank, and goes on as `norm.py`. The sum over ranks is rounded to
the dtype of x, as an all-reduce would, and so is the sum with a bias.

Ranks count the launches of each row; a flag holds the number of the latest launch that its writer has reached. A part may be
written again once the next launch but one is reached, if launches use two parts in turn: the one in between says that every
rank has read the first. All-reduce with one step: Hansen and others, "one-shot", as in NCCL's and PyTorch's small messages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.norm import ELEMENTS_PER_WARP, MAX_HIDDEN
from hf_fastattn.kernels.rehearsal import prepared

# Looks at a flag, of about half a microsecond each, until a rank counts as late: more than compiling kernels takes.
LOOKS = 1 << 28


@triton.jit
def add_to_residual(total, residual, x_ptr, bias_ptr, sum_ptr, column, ok):
    """The sum over ranks, rounded to the dtype of x, and with a bias again, and the residual; stored, and in fp32."""
    x = total.to(x_ptr.dtype.element_ty).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=ok, other=0.0)
        x = (x + bias.to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)
    x = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + column, x, mask=ok)
    return x.to(tl.float32)


@triton.jit
def summed_norm_kernel(
    parts_ptr, flags_ptr, launch_ptr, late_ptr, x_ptr, residual_ptr, bias_ptr, weight_ptr, out_ptr, sum_ptr, eps, stride_r,
    rank, most_looks,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, UNIT_OFFSET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of `[T, HIDDEN]`; `parts_ptr` and `flags_ptr` are addresses by rank, `x_ptr` is this rank's part."""
    column = tl.arange(0, BLOCK)  # [BLOCK], as all below
    ok = column < HIDDEN
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + column, mask=ok, other=0.0)
    # Only once this rank's parts are complete: the launch ahead has written them, and the one before has read others.
    if OVERLAP:
        gdc_wait()
    number = tl.load(launch_ptr + row) + 1
    for other in tl.static_range(RANKS):
        there_ptr = tl.load(flags_ptr + other).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(there_ptr + row * RANKS + rank, number, sem="release", scope="sys")
    residual = tl.load(residual_ptr + row * stride_r + column, mask=ok, other=0.0)
    here_ptr = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int32))
    for other in tl.static_range(RANKS):
        looks = 0
        # A difference, so that numbers may wrap.
        while (tl.atomic_add(here_ptr + row * RANKS + other, 0, sem="acquire", scope="sys") - number < 0) & (
            looks < most_looks
        ):
            looks += 1
        if looks >= most_looks:
            tl.store(late_ptr, 1)
    # Not before every thread has read it: none is past the first look at a flag until all have come to it.
    tl.store(launch_ptr + row, number)
    total = tl.zeros([BLOCK], tl.float32)
    for other in tl.static_range(RANKS):
        # Without the hint nothing is known of an address that was loaded, and each element is read by itself.
        part_ptr = tl.multiple_of(tl.load(parts_ptr + other).to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
        # Not from the L1 cache, which may hold what was there before.
        total += tl.load(part_ptr + row * HIDDEN + column, mask=ok, other=0.0, volatile=True).to(tl.float32)
    if OVERLAP:
        gdc_launch_dependents()
    wide = add_to_residual(total, residual, x_ptr, bias_ptr, sum_ptr + row * HIDDEN, column, ok)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    scale = weight.to(tl.float32)
    if UNIT_OFFSET:
        scale += 1.0
    tl.store(out_ptr + row * HIDDEN + column, (wide * inverse * scale).to(out_ptr.dtype.element_ty), mask=ok)


def check_added(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise a ValueError if a residual, a norm's weight or a bias do not fit the rows of x."""
    if residual.shape != x.shape or residual.dtype not in (x.dtype, torch.float32) or residual.stride(-1) != 1:
        raise ValueError(f"residual {tuple(residual.shape)}, {residual.dtype}, must be as x, {tuple(x.shape)}, or in fp32")
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and (one.shape != x.shape[1:] or not one.is_contiguous()):
            raise ValueError(f"{name} {tuple(one.shape)} must be [hidden] = {list(x.shape[1:])} and contiguous")


def summed_norm(
    x: Tensor,
    parts: Tensor,
    flags: Tensor,
    launches: Tensor,
    late: Tensor,
    rank: int,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    looks: int = LOOKS,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of the sum of every rank's x and the residual, and that sum.

    Args:
        x: `[T, hidden]` bf16, fp16 or fp32, contiguous: this rank's part, which the others read; at multiples of 16 bytes.
        parts: `[ranks]` int64, where each rank's x is, as this device sees it.
        flags: `[ranks]` int64, where each rank's flags are: at least `[T, ranks]` int32, zeros at first.
        launches: `[>= T]` int32, zeros at first; counted by the kernel.
        late: `[1]` int32, set if a rank was waited for in vain; what is returned is worth nothing then.
        rank: this one's number.
        residual: `[T, hidden]` of the dtype of x or fp32.
        weight: `[hidden]`, which no launch that may still be running writes.
        eps: added to the mean square.
        bias: `[hidden]`, added once.
        unit_offset: multiply by `1 + weight`.
        dtype: of the normalised rows; by default that of the residual.
        looks: at a flag, before a rank is late.

    Returns:
        The normalised rows and the sums, the latter in the dtype of the residual, both `[T, hidden]`, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    if x.ndim != 2 or x.dtype not in DTYPES or not x.is_contiguous() or not 0 < x.shape[1] <= MAX_HIDDEN:
        raise ValueError(
            f"x {tuple(x.shape)}, {x.dtype}, must be [T, hidden] with hidden from 1 to {MAX_HIDDEN}, contiguous, of a dtype "
            f"among {DTYPES}"
        )
    tokens, hidden = x.shape
    check_added(x, residual, weight, bias)
    if parts.shape != flags.shape or parts.ndim != 1 or not 0 <= rank < len(parts) or len(launches) < tokens:
        raise ValueError(
            f"parts {tuple(parts.shape)} and flags {tuple(flags.shape)} must be [ranks] with rank={rank} among them, and "
            f"launches {tuple(launches.shape)} at least [{tokens}]"
        )
    out = torch.empty((tokens, hidden), dtype=dtype or residual.dtype, device=x.device)
    total = torch.empty((tokens, hidden), dtype=residual.dtype, device=x.device)
    if not tokens:
        return out, total
    block, overlap = power_of_2(hidden), overlaps_launches(arch_of(x.device))
    with on_device_of(x):
        prepared(summed_norm_kernel)[(tokens,)](
            parts, flags, launches, late, x, residual, bias, weight, out, total, eps, residual.stride(0), rank, looks,
            HIDDEN=hidden, BLOCK=block, RANKS=len(parts), UNIT_OFFSET=unit_offset, OVERLAP=overlap,
            num_warps=min(max(block // ELEMENTS_PER_WARP, 1), 16), **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out, total
