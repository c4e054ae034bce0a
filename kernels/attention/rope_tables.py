"""cos and sin of the positions of a few tokens, in one launch.

`cos(p f) * factor` and `sin(p f) * factor` of each frequency `f`, for both halves of a head, rounded to the dtype of the
model, as Transformers' rotary embeddings compute them in eight launches or more; and sin with the sign of rotate_half, which
takes two more. The plain PyTorch version is `rope_reference.tables`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.rehearsal import prepared


@triton.jit
def rope_tables_kernel(
    frequencies_ptr, positions_ptr, cos_ptr, sin_ptr, signed_ptr, factor,
    HALF: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token: `[2 * HALF]` of each table."""
    if OVERLAP:
        # In this order: what comes behind reads lengths and pages before it waits, which the launches ahead may be writing.
        gdc_wait()
        gdc_launch_dependents()
    half = tl.arange(0, BLOCK)  # [BLOCK], as all below
    ok = half < HALF
    frequency = tl.load(frequencies_ptr + half, mask=ok, other=0.0).to(tl.float32)
    token = tl.program_id(0).to(tl.int64)
    angle = tl.load(positions_ptr + token).to(tl.float32) * frequency
    dtype = cos_ptr.dtype.element_ty
    cos = (tl.cos(angle) * factor).to(dtype)
    sin = (tl.sin(angle) * factor).to(dtype)
    first = token * (2 * HALF) + half
    second = first + HALF
    tl.store(cos_ptr + first, cos, mask=ok)
    tl.store(cos_ptr + second, cos, mask=ok)
    tl.store(sin_ptr + first, sin, mask=ok)
    tl.store(sin_ptr + second, sin, mask=ok)
    tl.store(signed_ptr + first, -sin, mask=ok)
    tl.store(signed_ptr + second, sin, mask=ok)


def rope_tables(
    frequencies: Tensor, position_ids: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """cos, sin, and sin as `rope_reference.signed_sin` has it, of the tokens' positions.

    Args:
        frequencies: `[rotary dims / 2]` bf16, fp16 or fp32, contiguous, in radians a position.
        position_ids: `[B, S]` int32 or int64, contiguous.
        factor: on cos and sin.
        dtype: of the tables: bf16, fp16 or fp32.

    Returns:
        `[B, S, rotary dims]` three times.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    if frequencies.ndim != 1 or frequencies.dtype not in DTYPES or not frequencies.is_contiguous():
        raise ValueError(
            f"frequencies {tuple(frequencies.shape)}, {frequencies.dtype}, must be [rotary dims / 2], contiguous, of a "
            f"dtype among {DTYPES}"
        )
    if position_ids.ndim != 2 or position_ids.dtype not in (torch.int32, torch.int64) or not position_ids.is_contiguous():
        raise ValueError(
            f"position_ids {tuple(position_ids.shape)}, {position_ids.dtype}, must be [B, S] int32 or int64, contiguous"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be among {DTYPES}")
    half, tokens = frequencies.shape[0], position_ids.numel()
    tables = torch.empty((3, *position_ids.shape, 2 * half), dtype=dtype, device=position_ids.device)
    cos, sin, signed = tables.unbind()
    if tables.numel():
        overlap = overlaps_launches(arch_of(position_ids.device))
        with on_device_of(position_ids):
            prepared(rope_tables_kernel)[(tokens,)](
                frequencies, position_ids, cos, sin, signed, factor, HALF=half, BLOCK=power_of_2(half), OVERLAP=overlap,
                num_warps=1, **({"launch_pdl": True} if overlap else {}),
            )  # fmt: skip
    return cos, sin, signed
