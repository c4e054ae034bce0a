"""Work items of the Gluon prefill: what producer and consumers read of an item, and which tiles of keys it visits."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_fastattn.kernels.attention.prefix_items import ITEM
from hf_fastattn.kernels.attention.visited import MASK_HIDES_NOTHING, number_of


@gluon.jit
def items_of_program(items_ptr, PREFIXES: gl.constexpr):
    """`(first, past, step)`: the work items of this program. `items_ptr` says how many there are, of prefixes which."""
    program = gl.program_id(0)
    if PREFIXES:
        return gl.load(items_ptr + program * 2), gl.load(items_ptr + program * 2 + 1), 1
    else:
        return program, gl.load(items_ptr), gl.num_programs(0)


@gluon.jit
def tile_of(work, cu_seqlens, seq_lens, t, CFG: gl.constexpr):
    """Work item `t`: row, first packed query, head slot, first token, new tokens, keys, K/V tiles, and the first key.

    Of a part of a prefix: the row whose page table is read, and for tokens the rows that share the prefix.
    """
    BLOCK_M: gl.constexpr = CFG[0]
    BLOCK_N: gl.constexpr = CFG[1]
    PACKED: gl.constexpr = CFG[6]
    if CFG[8]:
        item = work + t * ITEM
        b = gl.load(item)
        length = gl.load(item + 5)
        count = (length + BLOCK_N - 1) // BLOCK_N
        return b, b * 0, gl.load(item + 3), gl.load(item + 1), gl.load(item + 2), length, count, gl.load(item + 4)
    else:
        b = gl.load(work + t * 4)
        first_query = gl.load(work + t * 4 + 1)
        slot = gl.load(work + t * 4 + 2)
        first_token = gl.load(cu_seqlens + b)
        new = gl.load(cu_seqlens + b + 1) - first_token
        length = gl.load(seq_lens + b)
        seen = gl.minimum(length, first_query // PACKED + BLOCK_M // PACKED + length - new)
        return b, first_query, slot, first_token, new, length, gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, 1), b * 0


@gluon.jit
def lists_of(visited, t, SLOTS: gl.constexpr, LISTS: gl.constexpr):
    """Of work item `t` the list of K/V tiles, how many are seen wholly and in part, and its length in memory."""
    counts, listed, columns = visited
    item = t if LISTS > 1 else t // SLOTS
    whole = gl.load(counts + item * 2)
    partly = gl.load(counts + item * 2 + 1)
    return listed + item.to(gl.int64) * columns, whole, partly, columns


@gluon.jit
def listed_tile(lists, j):
    """The `j`-th tile of `lists_of`, marked: those seen in part come first, the last of the row at their head."""
    listed, whole, partly, columns = lists
    at = gl.where(j < partly, columns - partly + j, j - partly)
    return gl.load(listed + at, mask=whole + partly > 0, other=0)


@gluon.jit
def item_of(pointers, numbers, visited, t, CFG: gl.constexpr, LISTS: gl.constexpr):
    """What a consumer has to know of work item `t`: as `tile_of`, and tiles with a mask, the first key, the list.

    And whether a variant's mask hides anything of the first tile.
    """
    work, page_table, cu_seqlens, seq_lens = pointers
    items, stride_table, groups, ratio, beyond = numbers
    BLOCK_N: gl.constexpr = CFG[1]
    PACKED: gl.constexpr = CFG[6]
    b, first_query, slot, first_token, new, length, count, origin = tile_of(work, cu_seqlens, seq_lens, t, CFG)
    if LISTS > 0:
        lists = lists_of(visited, t, groups * ratio // PACKED, LISTS)
        count = gl.maximum(lists[1] + lists[2], 1)
        masked = lists[2]
        tile = listed_tile(lists, 0)
        first_key = number_of(tile) * BLOCK_N
        hides = tile < MASK_HIDES_NOTHING
        listed = lists[0]
    else:
        # Tiles of keys that every query sees, and that end before the row does, need no mask.
        unmasked = length // BLOCK_N
        if not CFG[8]:
            unmasked = gl.minimum(length, gl.maximum(first_query // PACKED + length - new + 1, 0)) // BLOCK_N
        masked = count - unmasked
        first_key = (count - 1) * BLOCK_N
        hides = True
        listed = work
    return b, first_query, slot, first_token, new, length, count, masked, first_key, listed, hides


@gluon.jit
def key_of(listed, visited, j, count, masked, BLOCK_N: gl.constexpr, LISTS: gl.constexpr):
    """The first key of the `j`-th tile of a work item, j > 0."""
    if LISTS > 0:
        counts, tiles, columns = visited
        return number_of(gl.load(listed + gl.where(j < masked, columns - masked + j, j - masked))) * BLOCK_N
    else:
        return (count - 1 - j) * BLOCK_N
