"""Generation without end, before a token is appended: full rows let their oldest tokens go but for the sinks.

The pages of a row hold its sinks, then its last tokens in their order. A full row moves the first `leaving` of the pages
behind the sinks to the end of its table, where they are written anew, and is that many tokens shorter: positions are
places in the cache (Xiao et al., 2023, "StreamingLLM"), so nothing else changes. One small launch in a recorded step, and no
page is taken or given back. The plain PyTorch version is `slide_reference.slide`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared


@triton.jit
def slide_kernel(
    seq_lens_ptr, table_ptr, stride_table,
    PAGE: tl.constexpr, SINKS: tl.constexpr, LEAVING: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0)
    length = tl.load(seq_lens_ptr + row)
    if length >= COLUMNS * PAGE:
        column = tl.arange(0, BLOCK)
        ok = (column >= SINKS) & (column < COLUMNS)
        source = column + LEAVING
        source = tl.where(source < COLUMNS, source, source - (COLUMNS - SINKS))
        base = table_ptr + row.to(tl.int64) * stride_table
        page = tl.load(base + source, mask=ok, other=0)
        # Every thread has read before one writes.
        tl.debug_barrier()
        tl.store(base + column, page, mask=ok)
        tl.store(seq_lens_ptr + row, length - LEAVING * PAGE)


def slide(seq_lens: Tensor, table: Tensor, *, page_size: int, sinks: int, leaving: int, pages: int) -> None:
    """Make room for a token in each row.

    Args:
        seq_lens: `[B]` int32 tokens of each row, changed in place.
        table: `[B, columns]` int32 pages, changed in place; of a full row all are its own but the sinks.
        page_size: tokens a page (P).
        sinks: pages that stay.
        leaving: pages that are used anew at a time.
        pages: of a full row.

    Raises:
        ValueError: the table has fewer columns than a full row has pages.
    """
    if table.shape[1] < pages or not 0 < leaving <= pages - sinks:
        raise ValueError(f"a table of {table.shape[1]} columns holds no rows of {pages} pages, of which {leaving} leave")
    with on_device_of(seq_lens):
        prepared(slide_kernel)[(seq_lens.shape[0],)](
            seq_lens, table, table.stride(0),
            PAGE=page_size, SINKS=sinks, LEAVING=leaving, COLUMNS=pages, BLOCK=power_of_2(pages),
            num_warps=min(max(power_of_2(pages) // 128, 1), 8),
        )  # fmt: skip
