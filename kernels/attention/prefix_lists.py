"""What the programs of `shared_prefix.py` work out from the lengths and groups on the device, and where their states go."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.attention.shares import program_of


@triton.jit
def prefix_of_rows(group_starts_ptr, prefix_lens_ptr, row, valid, groups, STEPS: tl.constexpr):
    """Tokens that each row shares, by binary search for its group; 0 past the last group."""
    group = tl.zeros_like(row)
    for i in tl.static_range(STEPS):
        middle = group + (1 << (STEPS - 1 - i))
        known = valid & (middle < groups)
        start = tl.load(group_starts_ptr + middle, mask=known, other=0)
        group = tl.where(known & (start <= row), middle, group)
    stop = tl.load(group_starts_ptr + group + 1, mask=valid, other=0)
    return tl.load(prefix_lens_ptr + group, mask=valid & (row < stop), other=0)


@triton.jit
def suffix_list(
    seq_lens_ptr, group_starts_ptr, prefix_lens_ptr, row, valid, groups, STEPS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Where each row's suffix begins, and how many tiles the suffixes up to and with that row have: each at least one."""
    starts = prefix_of_rows(group_starts_ptr, prefix_lens_ptr, row, valid, groups, STEPS)
    lengths = tl.load(seq_lens_ptr + row, mask=valid, other=0)
    tiles = tl.maximum((lengths - starts + BLOCK_N - 1) // BLOCK_N, 1)
    return starts, tl.cumsum(tl.where(valid, tiles, 0), 0)


@triton.jit
def equal_range(number, programs, total):
    """`[position, end)` of `total` units for program `number` of `programs`; the first `extra` ones take one unit more."""
    used = tl.maximum(tl.minimum(total, programs), 1)
    share = total // used
    extra = total % used
    position = number * share + tl.minimum(number, extra)
    end = position + share + (number < extra).to(tl.int32)
    end = tl.where((number >= 0) & (number < used), end, position)
    return position, end, share, extra


@triton.jit
def entry_at(position, upto, valid, GROUPS: tl.constexpr):
    """Which entry of a list (group, or row) the tile `position` belongs to, and its number among the tiles of that entry."""
    before = (upto <= position // GROUPS) & valid
    return tl.sum(before.to(tl.int32), 0), position - tl.max(tl.where(before, upto, 0), 0) * GROUPS


@triton.jit
def part_rows(number, position, unit, count, take, share, extra, base, whole, inner, BLOCK: tl.constexpr):
    """Where a state goes among the partial states, where the first part of its triple is, and how many parts there are.

    A split triple is the last one of its first program and the first one of all others: two blocks a program suffice.
    One that has not been split goes to `whole`.
    """
    first = program_of(position - unit, share, extra)
    last = program_of(position - unit + count - 1, share, extra)
    split = take < count
    own = base + (number * 2 + (number == first).to(tl.int32)) * BLOCK + inner
    begin = base + (first * 2 + 1) * BLOCK + inner
    return tl.where(split, own, whole), tl.where(split, begin, whole), tl.where(split, last - first + 1, 1)


@triton.jit
def store_state(partial_ptr, partial_sum_ptr, at, ok, row_max, row_sum, acc):
    """A state `[M, BLOCK_D]` to the rows `at`; maximum and sum apart: their logarithm would round the weight of the part."""
    d = tl.arange(0, acc.shape[1])
    tl.store(partial_ptr + at[:, None] * acc.shape[1] + d[None, :], acc, mask=ok[:, None])
    tl.store(partial_sum_ptr + at * 2, row_max, mask=ok)
    tl.store(partial_sum_ptr + at * 2 + 1, row_sum, mask=ok)
