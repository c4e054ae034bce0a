"""What the programs of `decode.py` compute from the lengths on the device: the work list, its split, the item at a position.

An item is one (row, query block) pair. The list holds units of keys: rows outermost, in each its query blocks, in each
the units of that item. Every kv head has the same list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.attention.shares import program_of


@triton.jit
def plan_split(
    seq_lens_ptr, cu_seqlens_ptr, rows, window, chunk, chunks,
    RATIO: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr,
    ITEM_KEYS: tl.constexpr, UNEVEN_KEYS: tl.constexpr, MOST_WHOLE: tl.constexpr, MERGED: tl.constexpr,
    ONE_BLOCK: tl.constexpr, HAS_WINDOW: tl.constexpr, counts_ptr=None, LISTS: tl.constexpr = 1,
):  # fmt: skip
    """The range of the list that program `chunk` of `chunks` takes.

    `counts_ptr` says how many tiles of keys each row visits (see `find_item`), by default all in its window.

    Returns:
        `upto: [BLOCK_B]`, where each row ends in the list; `fill` and `spare`, how items are padded (see `_choose_split`);
        the range `[position, end)`; and `share` and `extra`, which say where all ranges begin (see `program_of`).
    """
    row = tl.arange(0, BLOCK_B)
    valid = row < rows
    lengths = tl.load(seq_lens_ptr + row, mask=valid, other=0)  # [BLOCK_B], as news, blocks, units, spares and upto
    if cu_seqlens_ptr is None:
        news = tl.full([BLOCK_B], 1, tl.int32)
    else:
        news = tl.load(cu_seqlens_ptr + row + 1, mask=valid, other=0) - tl.load(cu_seqlens_ptr + row, mask=valid, other=0)
    blocks = (news * RATIO + BLOCK_M - 1) // BLOCK_M
    units = (lengths + UNIT * BLOCK_N - 1) // (UNIT * BLOCK_N)
    if counts_ptr is not None:
        units = (tl.load(counts_ptr + row * LISTS * 2, mask=valid, other=0) + UNIT - 1) // UNIT
    elif HAS_WINDOW:
        units -= tl.maximum(lengths - news + 1 - window, 0) // (UNIT * BLOCK_N)
    # A row without keys still has an output to write.
    units = tl.where(valid, tl.maximum(units, 1), 0)
    fill = 1
    whole = 1
    spare = 0
    if UNIT == 1:
        items = rows
        if not ONE_BLOCK:
            items = tl.sum(tl.where(valid, blocks, 0), 0)
        fill, whole, spare, chunks = _choose_split(
            units, blocks, items, chunks, BLOCK_N, ITEM_KEYS, UNEVEN_KEYS, MOST_WHOLE, MERGED
        )
    spares = tl.where(lengths > 0, spare, 0)
    upto = tl.cumsum(tl.where(valid, (units + fill - 1) // fill * fill + spares, 0) * blocks, 0)
    total = tl.max(upto, 0)
    # The first `extra` ranges are one unit longer than the others.
    share = total // chunks
    extra = total % chunks
    if fill > 1:
        share = whole * fill
        extra = 0
    position = chunk * share + tl.minimum(chunk, extra)
    end = tl.minimum(position + share + (chunk < extra).to(tl.int32), total)
    if (spare > 0) & (position < end):
        # If the range starts in an item's padding units, move on to the next item.
        _, _, _, _, _, _, count, filled, _, unit = find_item(
            position, upto, fill, spare, seq_lens_ptr, cu_seqlens_ptr, window, UNIT, BLOCK_N, HAS_WINDOW, counts_ptr, LISTS
        )
        position += tl.where(unit >= count, filled - unit, 0)
    return upto, fill, spare, position, end, share, extra


@triton.jit
def _choose_split(
    units, blocks, items, chunks,
    BLOCK_N: tl.constexpr, ITEM_KEYS: tl.constexpr, UNEVEN_KEYS: tl.constexpr, MOST_WHOLE: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Even split or stream-K, for `units: [BLOCK_B]` of each item of a row and `blocks: [BLOCK_B]` items a row.

    Even: each item is padded to a multiple of `fill` units, and a program takes `whole * fill` of them. Stream-K: each item
    with keys gets `spare` empty units for its fixed cost, and the list is cut anywhere.

    Returns:
        `fill`, `whole`, `spare`, and how many programs get work.
    """
    fill = 1
    whole = 1
    spare = 0
    # Most parts of an item: with more, merging them would take longer than reading one.
    most = tl.sqrt((tl.max(units, 0) * BLOCK_N).to(tl.float32) * MERGED).to(tl.int32)
    chunks = tl.maximum(tl.minimum(chunks, items * tl.maximum(most, 1)), 1)
    splits = chunks // tl.maximum(items, 1)
    even = tl.cdiv(tl.max(units, 0), tl.maximum(splits, 1))
    several = tl.cdiv(items, chunks)
    longest = tl.sum(units * blocks, 0) // chunks + 1 + UNEVEN_KEYS // BLOCK_N
    # Programs that begin and end whole items at one time leave the memory idle meanwhile. Measured: an even split still pays
    # for up to MOST_WHOLE items a program, the number of programs that share an SM.
    if (several <= MOST_WHOLE) & (several * even <= longest):
        fill = even
        whole = several
    else:
        spare = ITEM_KEYS // BLOCK_N
    return fill, whole, spare, chunks


@triton.jit
def find_item(
    position, upto, fill, spare, seq_lens_ptr, cu_seqlens_ptr, window,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, counts_ptr=None, LISTS: tl.constexpr = 1,
):  # fmt: skip
    """The item at a position of the list, of which `upto: [BLOCK_B]` says where each row ends.

    With `counts_ptr: [B, LISTS, 2]`, the second numbers of a `Visited` and of the list of this program's kv head, units are
    of the tiles that the row visits, in the order of that list.

    Returns:
        Row `b`, its keys `length`, its first query token and number of new tokens; the first key that one of them sees, and
        the unit of that key; units of each item of the row, without padding and with; the item's query block, and the unit
        of the item at the position.
    """
    before = upto <= position
    b = tl.sum(before.to(tl.int32), 0)
    base = tl.max(tl.where(before, upto, 0), 0)
    length = tl.load(seq_lens_ptr + b)
    if cu_seqlens_ptr is None:
        first_token = b
        new = 1
    else:
        first_token = tl.load(cu_seqlens_ptr + b)
        new = tl.load(cu_seqlens_ptr + b + 1) - first_token
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - new + 1 - window, 0)
    first_unit = lowest // (UNIT * BLOCK_N)
    if counts_ptr is not None:
        first_unit = 0
        count = tl.maximum((tl.load(counts_ptr + b * LISTS * 2) + UNIT - 1) // UNIT, 1)
    else:
        count = tl.maximum((length + UNIT * BLOCK_N - 1) // (UNIT * BLOCK_N) - first_unit, 1)
    filled = (count + fill - 1) // fill * fill + tl.where(length > 0, spare, 0)
    block, unit = (position - base) // filled, (position - base) % filled
    return b, length, first_token, new, lowest, first_unit, count, filled, block, unit


@triton.jit
def part_numbers(base, unit, count, chunk, share, extra, UNIT: tl.constexpr):
    """Numbers of the first and last part of a split item that begins at `base`, and where this program's part is kept.

    With UNIT = 1 a part is numbered by its program: a split item is the last item of its first program and the first item of
    all others, so two places a program are enough. With more, each unit is a part.
    """
    if UNIT == 1:
        first = program_of(base, share, extra)
        last = program_of(base + count - 1, share, extra)
        part = chunk * 2 + (chunk == first).to(tl.int32)
    else:
        first = base
        last = base + count - 1
        part = base + unit
    return first, last, part
