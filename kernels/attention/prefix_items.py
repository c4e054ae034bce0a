"""Work items of the Gluon kernel over shared prefixes, made on the device: who reads which part of a prefix, for whom.

Every program gets an equal range of all tiles of keys ("Stream-K", Osama et al., 2023), as in `shared_prefix.py`; what it
has of one triple (prefix group, kv head, query block) is an item. The number of an item is that of its triple plus that of
its program, so that no program has to know how many items the others have.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.attention.prefix_lists import (
    PLACE,
    entry_at,
    equal_range,
    part_rows,
    prefix_entry,
    prefix_list,
    used_programs,
)
from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared

# Int32 numbers of an item: the row whose page table is read, the first of its rows and how many, the kv head, the first key
# and how many, where the state of the first packed query goes, and how far from it that of the next row.
ITEM = tl.constexpr(8)


@triton.jit(do_not_specialize=["rows", "prefix_groups", "whole_base"])
def prefix_items_kernel(
    seq_lens_ptr, group_starts_ptr, prefix_lens_ptr, items_ptr, ranges_ptr, places_ptr, rows, prefix_groups, whole_base,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The items of one program, and the places of the prefixes that begin in them."""
    TILE_ROWS: tl.constexpr = BLOCK_M // RATIO
    pid = tl.program_id(0)
    is_group, upto, blocks = prefix_list(
        group_starts_ptr, prefix_lens_ptr, prefix_groups, BLOCK_P, BLOCK_N, TILE_ROWS, STEPS, LEVELS
    )  # fmt: skip
    programs = used_programs(tl.num_programs(0), tl.sum(blocks, 0) * GROUPS)
    position, end, share, extra = equal_range(pid, programs, tl.max(upto, 0) * GROUPS)
    # The triples of the prefix groups before that of the first tile, and of its own those before its triple.
    g, tile = entry_at(position, upto, is_group, GROUPS)
    group = tl.arange(0, BLOCK_P)
    tiles_before = tl.max(tl.where(group < g, upto, 0), 0)
    tiles = tl.sum(tl.where(group == g, upto, 0), 0) - tiles_before
    own_blocks = tl.maximum(tl.sum(tl.where(group == g, blocks, 0), 0), 1)
    triple = tl.sum(tl.where(group < g, blocks, 0), 0) * GROUPS + tile // tl.maximum(tiles // own_blocks, 1)
    first_item = triple + pid
    item = first_item
    row = tl.arange(0, BLOCK_B)
    m = tl.arange(0, BLOCK_M)
    while position < end:
        level, first_row, past_row, tile_row, head, begin, stop, count, unit = prefix_entry(
            position, upto, is_group, group_starts_ptr, prefix_lens_ptr, prefix_groups, GROUPS, BLOCK_N, TILE_ROWS,
            STEPS, LEVELS,
        )  # fmt: skip
        take = tl.minimum(count - unit, end - position)
        # A row without keys may hold no pages: the table of the group's first row with keys is read.
        active = tl.load(seq_lens_ptr + row, mask=(row >= first_row) & (row < past_row), other=0) > 0  # [BLOCK_B]
        reader = tl.min(tl.where(active, row, BLOCK_B), 0)
        if reader < BLOCK_B:
            token = tile_row + m // RATIO  # [BLOCK_M], a token a row
            pair = token * GROUPS + head
            whole = whole_base + (level * rows * GROUPS + pair) * RATIO + m % RATIO
            at, first, parts = part_rows(pid, position, unit, count, take, share, extra, 0, whole, m, BLOCK_M)
            lo = begin + unit * BLOCK_N
            new_ptr = items_ptr + item * ITEM
            tl.store(new_ptr, reader)
            tl.store(new_ptr + 1, tile_row)
            tl.store(new_ptr + 2, tl.minimum(past_row - tile_row, TILE_ROWS))
            tl.store(new_ptr + 3, head)
            tl.store(new_ptr + 4, lo)
            tl.store(new_ptr + 5, tl.minimum(take * BLOCK_N, stop - lo))
            tl.store(new_ptr + 6, tl.sum(tl.where(m == 0, at, 0), 0))
            tl.store(new_ptr + 7, tl.where(take < count, RATIO, GROUPS * RATIO))
            if unit == 0:
                place_ptr = places_ptr + pair * PLACE + level * 2
                ok = (token < past_row) & (m % RATIO == 0)
                tl.store(place_ptr, first, mask=ok)
                tl.store(place_ptr + 1, parts + tl.zeros_like(m), mask=ok)
            item += 1
        position += take
    tl.store(ranges_ptr + pid * 2, first_item)
    tl.store(ranges_ptr + pid * 2 + 1, item)


def prefix_items(
    seq_lens: Tensor,
    group_starts: Tensor,
    prefix_lens: Tensor,
    *,
    heads: tuple[int, int],
    programs: int,
    block_m: int,
    block_n: int,
    whole_base: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Work items for `programs` programs; the lengths and groups are read on the device.

    Args:
        seq_lens: `[B]` int32, keys of each row; `group_starts` and `prefix_lens` as in `paged_decode_shared`.
        group_starts: `[levels, groups + 1]` int32, or of one level `[groups + 1]`.
        prefix_lens: `[levels, groups]` int32, or `[groups]`.
        heads: query heads and kv heads.
        programs: that share the work.
        block_m: packed queries of a tile, a multiple of R.
        block_n: keys of a tile.
        whole_base: where the states of unsplit prefixes begin.

    Returns:
        `[items, ITEM]` int32; `[programs, 2]` int32, the first item of each program and the one past its last; and
        `[B * G, PLACE]` int32, of which the places of prefixes are written.
    """
    rows, kv_heads, groups = seq_lens.shape[0], heads[1], prefix_lens.shape[-1]
    levels, ratio = (prefix_lens.shape[0] if prefix_lens.ndim == 2 else 1), heads[0] // heads[1]
    triples = (triton.cdiv(rows, block_m // ratio) + groups) * levels * kv_heads
    items = torch.empty((triples + programs, ITEM.value), dtype=torch.int32, device=seq_lens.device)
    ranges = torch.empty((programs, 2), dtype=torch.int32, device=seq_lens.device)
    places = torch.empty((rows * kv_heads, PLACE.value), dtype=torch.int32, device=seq_lens.device)
    with on_device_of(seq_lens):
        prepared(prefix_items_kernel)[(programs,)](
            seq_lens, group_starts, prefix_lens, items, ranges, places, rows, groups, whole_base,
            GROUPS=kv_heads, RATIO=ratio, BLOCK_B=max(power_of_2(rows), 16), BLOCK_P=max(power_of_2(groups * levels), 16),
            STEPS=max(power_of_2(groups), 16).bit_length() - 1, LEVELS=levels, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return items, ranges, places
