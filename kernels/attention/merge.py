"""Merging of two attention states, `(output, LSE)` over disjoint keys, in one launch.

`lse = logaddexp(lse_a, lse_b)`, `out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b` (Ye et al., 2024, "Cascade
Inference"). The plain PyTorch version is `softmax_state.merge_states`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared

ROWS_PER_PROGRAM = 16


@triton.jit(do_not_specialize=["rows"])
def merge_states_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr, rows, stride_a, stride_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R states of `[rows, D]`.

    Not `tile.merge_step`: outputs are already normalised, so that the weights come from LSEs, and in base e.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    ok = row < rows
    inside = ok[:, None] & (column < D)[None, :]
    lse_a = tl.load(lse_a_ptr + row, mask=ok, other=0.0)  # [BLOCK_R]
    lse_b = tl.load(lse_b_ptr + row, mask=ok, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    # Without this, two empty states would give -inf - -inf = NaN.
    top = tl.where(top == float("-inf"), 0.0, top)
    weight_a = tl.exp(lse_a - top)
    weight_b = tl.exp(lse_b - top)
    total = weight_a + weight_b
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    row_64 = row.to(tl.int64)[:, None]  # [BLOCK_R, 1]
    out_a = tl.load(out_a_ptr + row_64 * stride_a + column[None, :], mask=inside, other=0.0).to(tl.float32)
    out_b = tl.load(out_b_ptr + row_64 * stride_b + column[None, :], mask=inside, other=0.0).to(tl.float32)
    out = out_a * (weight_a * inverse)[:, None] + out_b * (weight_b * inverse)[:, None]
    tl.store(out_ptr + row_64 * D + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row, tl.where(total > 0, top + tl.log(total), float("-inf")), mask=ok)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The state over the keys of both states.

    Args:
        out_a: `[..., D]` output of the first block, bf16, fp16 or fp32; `out_b` of the second.
        lse_a: `[...]` fp32, its LSE, natural logarithm, -inf for a block without visible keys; `lse_b` likewise.

    Returns:
        Output `[..., D]` in the dtype of `out_a` and LSE `[...]`; two empty states give output 0, LSE -inf.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or lse_a.shape != out_a.shape[:-1]:
        raise ValueError(
            f"out_a {tuple(out_a.shape)}, lse_a {tuple(lse_a.shape)}, out_b {tuple(out_b.shape)} and lse_b "
            f"{tuple(lse_b.shape)} must be [..., D], [...], [..., D] and [...]"
        )
    dim = out_a.shape[-1]
    flat_a, flat_b = out_a.reshape(-1, dim), out_b.reshape(-1, dim)
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=lse_a.device)
    rows = flat_a.shape[0]
    if rows:
        with on_device_of(out_a):
            prepared(merge_states_kernel)[(triton.cdiv(rows, ROWS_PER_PROGRAM),)](
                flat_a, lse_a.contiguous(), flat_b, lse_b.contiguous(), out, lse, rows, flat_a.stride(0), flat_b.stride(0),
                D=dim, BLOCK_D=power_of_2(dim), BLOCK_R=ROWS_PER_PROGRAM, num_warps=4,
            )  # fmt: skip
    return out, lse
