"""What programs over shared prefixes and suffixes compute from lengths and groups on the device, and where states go."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.attention.shares import program_of

# Levels of prefixes within prefixes.
MOST_LEVELS = 3
# Int32 numbers for each (row, kv head): of every level the row of the prefix's first state, and the number of its states.
# Padded for alignment.
PLACE = tl.constexpr(8)


@triton.jit
def prefix_of_rows(group_starts_ptr, prefix_lens_ptr, row, valid, prefix_groups, STEPS: tl.constexpr):
    """Tokens that each row shares in one level, by binary search for its prefix group; 0 past the last one."""
    group = tl.zeros_like(row)
    for i in tl.static_range(STEPS):
        middle = group + (1 << (STEPS - 1 - i))
        known = valid & (middle < prefix_groups)
        start = tl.load(group_starts_ptr + middle, mask=known, other=0)
        group = tl.where(known & (start <= row), middle, group)
    stop = tl.load(group_starts_ptr + group + 1, mask=valid, other=0)
    return tl.load(prefix_lens_ptr + group, mask=valid & (row < stop), other=0)


@triton.jit
def prefix_of_row(
    group_starts_ptr, prefix_lens_ptr, b, prefix_groups, BLOCK_P: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """Tokens that row `b` shares in all levels together, and in which of these it shares some, a bit each."""
    group = tl.arange(0, BLOCK_P)
    known = group < prefix_groups
    shared = 0
    shares = 0
    for level in tl.static_range(LEVELS):
        starts_ptr = group_starts_ptr + level * (prefix_groups + 1) + group
        first = tl.load(starts_ptr, mask=known, other=0)
        past = tl.load(starts_ptr + 1, mask=known, other=0)
        held = tl.load(prefix_lens_ptr + level * prefix_groups + group, mask=known, other=0)
        # Its prefix group is the only one that is not empty and holds it.
        tokens = tl.sum(tl.where((first <= b) & (b < past), held, 0), 0)
        shares += (tokens > shared).to(tl.int32) << level
        shared = tl.maximum(shared, tokens)
    return shared, shares


@triton.jit
def shared_above(
    group_starts_ptr, prefix_lens_ptr, row, valid, level, prefix_groups, STEPS: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """Tokens that each row shares in the levels before `level`."""
    found = tl.zeros_like(row)
    for above in tl.static_range(LEVELS - 1):
        starts_ptr = group_starts_ptr + above * (prefix_groups + 1)
        lens_ptr = prefix_lens_ptr + above * prefix_groups
        tokens = prefix_of_rows(starts_ptr, lens_ptr, row, valid & (level > above), prefix_groups, STEPS)
        found = tl.maximum(found, tokens)
    return found


@triton.jit
def prefix_list(
    group_starts_ptr, prefix_lens_ptr, prefix_groups,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TILE_ROWS: tl.constexpr, STEPS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The list of prefixes: levels, in each the prefix groups, in each the kv heads, the query blocks, the tiles of keys.

    Returns:
        Which of BLOCK_P prefix groups of all levels there are; how many tiles of one kv head those up to and with each have;
        and how many query blocks each has, 0 without keys.
    """
    group = tl.arange(0, BLOCK_P)
    is_group = group < prefix_groups * LEVELS
    # A level has one more start than groups.
    level = group // prefix_groups if LEVELS > 1 else 0
    starts_ptr = group_starts_ptr + group + level
    first = tl.load(starts_ptr, mask=is_group, other=0)
    sharers = tl.load(starts_ptr + 1, mask=is_group, other=0) - first
    shared = tl.load(prefix_lens_ptr + group, mask=is_group, other=0)  # [BLOCK_P]
    if LEVELS > 1:
        above = shared_above(group_starts_ptr, prefix_lens_ptr, first, is_group, level, prefix_groups, STEPS, LEVELS)
        shared = tl.maximum(shared - above, 0)
    blocks = (sharers + TILE_ROWS - 1) // TILE_ROWS
    upto = tl.cumsum((shared + BLOCK_N - 1) // BLOCK_N * blocks, 0)
    return is_group, upto, tl.where(shared > 0, blocks, 0)


@triton.jit
def used_programs(programs, triples):
    """How many of the programs work on prefixes: as many for each of the triples, if at most 1/16 of the programs idle.

    The query blocks of a kv head then read the same keys at the same time.
    """
    alike = programs // tl.maximum(triples, 1) * triples
    return tl.where(alike * 16 >= programs * 15, alike, programs)


@triton.jit
def prefix_entry(
    position, upto, is_group, group_starts_ptr, prefix_lens_ptr, prefix_groups,
    GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, TILE_ROWS: tl.constexpr, STEPS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The triple that the tile `position` of the list of prefixes belongs to.

    Returns:
        The level of its prefix group; the group's first row, and the row past the last; the first row of its query block;
        its kv head; where the prefix begins and ends; its tiles, and the tile's number among these.
    """
    g, tile = entry_at(position, upto, is_group, GROUPS)
    level = g // prefix_groups if LEVELS > 1 else 0
    first_row = tl.load(group_starts_ptr + g + level)
    past_row = tl.load(group_starts_ptr + g + level + 1)
    stop = tl.load(prefix_lens_ptr + g)
    begin = 0
    if LEVELS > 1:
        begin = shared_above(
            group_starts_ptr, prefix_lens_ptr, first_row, first_row >= 0, level, prefix_groups, STEPS, LEVELS
        )  # fmt: skip
    count = (stop - begin + BLOCK_N - 1) // BLOCK_N
    blocks = (past_row - first_row + TILE_ROWS - 1) // TILE_ROWS
    tile_row = first_row + tile // count % blocks * TILE_ROWS
    return level, first_row, past_row, tile_row, tile // count // blocks, begin, stop, count, tile % count


@triton.jit
def equal_range(number, programs, total):
    """`[position, end)` of `total` units for program `number` of `programs`, then `share` and `extra`.

    The first `extra` programs take `share + 1` units, the others `share`; programs past the last unit get an empty range.
    """
    used = tl.maximum(tl.minimum(total, programs), 1)
    share = total // used
    extra = total % used
    position = number * share + tl.minimum(number, extra)
    end = position + share + (number < extra).to(tl.int32)
    end = tl.where((number >= 0) & (number < used), end, position)
    return position, end, share, extra


@triton.jit
def entry_at(position, upto, valid, GROUPS: tl.constexpr):
    """The entry of a list (prefix group, or row) that holds the tile `position`, and the tile's number in that entry.

    `upto` is the running count of the tiles of one kv head.
    """
    before = (upto <= position // GROUPS) & valid
    return tl.sum(before.to(tl.int32), 0), position - tl.max(tl.where(before, upto, 0), 0) * GROUPS


@triton.jit
def part_rows(number, position, unit, count, take, share, extra, base, whole, inner, BLOCK: tl.constexpr):
    """Rows `[BLOCK]` of a state among the partial states, rows of the first part of its item, and how many parts it has.

    A split item is the last item of its first program and the first item of all others, so two blocks a program are enough.
    The state of an unsplit item goes to `whole`.
    """
    first = program_of(position - unit, share, extra)
    last = program_of(position - unit + count - 1, share, extra)
    split = take < count
    own = base + (number * 2 + (number == first).to(tl.int32)) * BLOCK + inner
    begin = base + (first * 2 + 1) * BLOCK + inner
    return tl.where(split, own, whole), tl.where(split, begin, whole), tl.where(split, last - first + 1, 1)


@triton.jit
def store_state(partial_ptr, partial_sum_ptr, at, ok, row_max, row_sum, acc):
    """A state to the rows `at: [M]`; maximum and sum are kept apart: their logarithm would round the weight of the part."""
    d = tl.arange(0, acc.shape[1])
    tl.store(partial_ptr + at[:, None] * acc.shape[1] + d[None, :], acc, mask=ok[:, None])
    tl.store(partial_sum_ptr + at * 2, row_max, mask=ok)
    tl.store(partial_sum_ptr + at * 2 + 1, row_sum, mask=ok)
