"""The work list of a persistent kernel, made on the device: the (row, first packed query, head slot) of each tile."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared

TILES_PER_PROGRAM = 64

# What one layer made for others of the same batch: work lists, and lists of visited tiles.
WorkLists = dict[Any, Any]


@triton.jit(do_not_specialize=["rows"])
def work_list_kernel(
    cu_seqlens_ptr, work_ptr, count_ptr, rows,
    SLOTS: tl.constexpr, PACKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Tiles [program * BLOCK_T, ...): row after row, in each the last queries (which see most) first, heads innermost."""
    row = tl.arange(0, BLOCK_B)
    valid = row < rows
    news = tl.load(cu_seqlens_ptr + row + 1, mask=valid, other=0) - tl.load(cu_seqlens_ptr + row, mask=valid, other=0)
    tiles = tl.where(valid, (news * PACKED + BLOCK_M - 1) // BLOCK_M * SLOTS, 0)  # [BLOCK_B]
    upto = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T], as all from `b` on
    before = (upto[None, :] <= tile[:, None]) & valid[None, :]  # [BLOCK_T, BLOCK_B]
    b = tl.sum(before.to(tl.int32), 1)
    base = tl.max(tl.where(before, upto[None, :], 0), 1)
    count = tl.sum(tl.where(row[None, :] == b[:, None], tiles[None, :], 0), 1)
    from_end = (tile - base) // SLOTS
    first_query = (count // SLOTS - 1 - from_end) * BLOCK_M
    ok = tile < total
    tl.store(work_ptr + tile * 4, b, mask=ok)
    tl.store(work_ptr + tile * 4 + 1, first_query, mask=ok)
    tl.store(work_ptr + tile * 4 + 2, (tile - base) % SLOTS, mask=ok)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, total)


def work_list(cu_seqlens_q: Tensor, tokens: int, slots: int, packed: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Tiles of `block_m` packed queries for ragged rows of new tokens, without a look at the lengths from the host.

    Args:
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin.
        tokens: new tokens of all rows (T).
        slots: head slots, each of `packed` query heads: query heads that are not packed together have tiles of their own.
        packed: query heads packed with each token into the rows of a tile.
        block_m: packed queries a tile.

    Returns:
        `[tiles, 4]` int32 of (row, first packed query, slot, unused), and `[1]` int32, how many of them there are.
    """
    rows = cu_seqlens_q.shape[0] - 1
    # An upper bound that needs no lengths: no row has more than one tile that is not full.
    most = (triton.cdiv(tokens * packed, block_m) + rows) * slots
    work = torch.empty(most, 4, dtype=torch.int32, device=cu_seqlens_q.device)
    count = torch.empty(1, dtype=torch.int32, device=cu_seqlens_q.device)
    with on_device_of(cu_seqlens_q):
        prepared(work_list_kernel)[(triton.cdiv(most, TILES_PER_PROGRAM),)](
            cu_seqlens_q, work, count, rows,
            SLOTS=slots, PACKED=packed, BLOCK_M=block_m, BLOCK_B=max(power_of_2(rows), 16), BLOCK_T=TILES_PER_PROGRAM,
            num_warps=4,
        )  # fmt: skip
    return work, count
