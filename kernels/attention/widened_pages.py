"""Pages of 8 bits copied as pages of 16 bits: for prompts, whose attention runs at the speed of the kernels for those.

Each tile of queries reads all keys before it: dequantising them once, into memory that is free again after the layer, costs
less than doing so in the loop of matrix products. What is read is what is stored, so that a prompt
in pieces, a prefix found in pages and decode steps see the same keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.attention.eight_bits import key_and_value_scales
from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared

# New tokens a row from which the copy pays, and the most bytes it may take. Measured on an H200: the copy takes 1.5 ns a key
# of 8 heads of 128 dimensions, and a tile of queries over pages of 8 bits 3.7 ns, over those of 16 bits 0.9.
WIDENED_TOKENS, MOST_BYTES = 24, 2 * 2**30
# Elements of a program's tile.
TILE_ELEMENTS = 8192


@triton.jit(do_not_specialize=["stride_table", "columns"])
def widen_pages_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, page_table_ptr, seq_lens_ptr, columns, stride_page, stride_slot, stride_table,
    GROUPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One page of a row, BLOCK (token, head) pairs of it; pages that hold no token of the row are left as they are."""
    place = tl.program_id(0).to(tl.int64)
    row, column = place // columns, place % columns
    if column * PAGE < tl.load(seq_lens_ptr + row):
        page = tl.load(page_table_ptr + row * stride_table + column)
        if page >= 0:
            pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            slot, head = pair // GROUPS, pair % GROUPS
            d = tl.arange(0, BLOCK_D)
            ok_n = pair < PAGE * GROUPS
            ok = ok_n[:, None] & (d < D)[None, :]
            key_scales, value_scales = key_and_value_scales(k_ptr, page, slot, head, ok_n, stride_page, stride_slot, PAGE)
            off = (page.to(tl.int64) * stride_page + pair * D)[:, None] + d[None, :]
            out = (place * (PAGE * GROUPS * D) + pair * D)[:, None] + d[None, :]
            dtype = k_out_ptr.dtype.element_ty
            k = tl.load(k_ptr + off, mask=ok, other=0.0).to(tl.float32) * key_scales[:, None]
            tl.store(k_out_ptr + out, k.to(dtype), mask=ok)
            v = tl.load(v_ptr + off, mask=ok, other=0.0).to(tl.float32) * value_scales[:, None]
            tl.store(v_out_ptr + out, v.to(dtype), mask=ok)


def pays(q: Tensor, k_pages: Tensor, page_table: Tensor) -> bool:
    """Whether to widen the pages of a prompt's rows, for queries `q: [T, H, D]` and a table `[B, columns]`."""
    rows, columns = page_table.shape
    _, page, groups, dim = k_pages.shape
    return q.shape[0] >= WIDENED_TOKENS * rows and 4 * rows * columns * page * groups * dim <= MOST_BYTES


def widened_pages(
    k_pages: Tensor, v_pages: Tensor, page_table: Tensor, seq_lens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The pages that rows hold, in a wider dtype.

    Args:
        k_pages: `[N, P, G, D]` pages of 8 bits of `page_formats.page_views`; `v_pages` likewise.
        page_table: `[B, columns]` int32; columns that the row does not reach, and negative entries, are not read.
        seq_lens: `[B]` int32, tokens of each row.
        dtype: fp16, bf16 or fp32.

    Returns:
        K and V pages `[B * columns, P, G, D]` in `dtype`, and a table `[B, columns]` of them. Slots past a row's last token,
        and pages that were not read, hold anything.
    """
    rows, columns = page_table.shape
    _, page, groups, dim = k_pages.shape
    k_out, v_out = (torch.empty((rows * columns, page, groups, dim), dtype=dtype, device=k_pages.device) for _ in range(2))
    table = torch.arange(rows * columns, dtype=torch.int32, device=k_pages.device).view(rows, columns)
    block_d = power_of_2(dim)
    block = min(power_of_2(page * groups), max(TILE_ELEMENTS // block_d, 1))
    with on_device_of(k_pages):
        prepared(widen_pages_kernel)[(rows * columns, triton.cdiv(page * groups, block))](
            k_pages, v_pages, k_out, v_out, page_table, seq_lens, columns, k_pages.stride(0), k_pages.stride(1),
            page_table.stride(0), GROUPS=groups, D=dim, BLOCK_D=block_d, PAGE=page, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return k_out, v_out, table
