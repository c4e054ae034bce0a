"""The peer of shared prefixes: paged decode as vLLM 0.2.6 did it, of one program a row and query head.

A program walks over the pages of its row, a few of them at a time, without matrix units, split keys or sharing between
query heads or rows (Kwon et al., 2023, "PagedAttention"). Each lane keeps a softmax state of its own; they are merged at the
end. It serves the benchmark alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import LOG2E, check_pages, on_device_of, power_of_2

# Keys that a program reads at a time, and its warps: enough bytes in flight on an H200 with many programs.
KEYS, WARPS = 64, 4


@triton.jit(do_not_specialize=["stride_table"])
def page_by_page_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, page_table_ptr, seq_lens_ptr, scale,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table,
    RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The query head `program_id(0)` of row `program_id(1)`."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)
    ok_d = d < D
    q = tl.load(q_ptr + b * stride_qt + h * stride_qh + d, mask=ok_d, other=0.0).to(tl.float32) * scale
    length = tl.load(seq_lens_ptr + b)
    lane_max = tl.full([KEYS], float("-inf"), tl.float32)
    lane_sum = tl.zeros([KEYS], tl.float32)
    acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for first in range(0, length, KEYS):
        key_n = first + n
        ok_n = key_n < length
        page = tl.load(page_table_ptr + b * stride_table + key_n // PAGE, mask=ok_n, other=0).to(tl.int64)
        slot = page * stride_page + (key_n % PAGE) * stride_slot + (h // RATIO) * stride_head
        off_kv = slot[:, None] + d[None, :]  # [KEYS, BLOCK_D]
        ok = ok_n[:, None] & ok_d[None, :]
        k = tl.load(k_ptr + off_kv, mask=ok, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + off_kv, mask=ok, other=0.0).to(tl.float32)
        scores = tl.where(ok_n, tl.sum(q[None, :] * k, 1), float("-inf"))
        new_max = tl.maximum(lane_max, scores)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.math.exp2(scores - shift)
        decay = tl.math.exp2(lane_max - shift)
        lane_sum = lane_sum * decay + weight
        acc = acc * decay[:, None] + weight[:, None] * v
        lane_max = new_max
    row_max = tl.max(lane_max, 0)
    weight = tl.math.exp2(lane_max - tl.where(row_max == float("-inf"), 0.0, row_max))
    total = tl.sum(lane_sum * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_row = out_ptr + (b * tl.num_programs(0) + h) * D
    tl.store(out_row + d, out.to(out_ptr.dtype.element_ty), mask=ok_d)


def page_by_page(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, seq_lens: Tensor, *, scale: float
) -> Tensor:
    """Attention of one new token a row over paged keys and values.

    Args:
        q: `[B, H, D]` queries after RoPE.
        k_pages: `[N, P, G, D]` pages of keys; `v_pages` of values, with the same strides.
        page_table: `[B, columns]` int32.
        seq_lens: `[B]` int32, keys of each row.
        scale: factor on the scores.

    Returns:
        Output `[B, H, D]`; 0 for a row without keys.
    """
    check_pages(q, k_pages, v_pages)
    rows, heads, dim = q.shape
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    with on_device_of(q):
        page_by_page_kernel[(heads, rows)](
            q, k_pages, v_pages, out, page_table, seq_lens, scale * LOG2E,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            RATIO=heads // k_pages.shape[2], D=dim, BLOCK_D=power_of_2(dim), PAGE=k_pages.shape[1], KEYS=KEYS,
            num_warps=WARPS,
        )  # fmt: skip
    return out
