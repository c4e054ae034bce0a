"""Tiles of a launch for up to three weights: which weight one belongs to, that weight's pointer, and what is read of it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(tile, n0, n1, n2, BLOCK_N: tl.constexpr, WEIGHTS: tl.constexpr):
    """The weight that a tile of the launch belongs to, its rows, its first output column, and the tile's number in it."""
    which = 0
    rows = n0
    column = 0
    if WEIGHTS > 1:
        tiles = tl.cdiv(n0, BLOCK_N)
        if tile >= tiles:
            which = 1
            rows = n1
            column = n0
            tile -= tiles
    if WEIGHTS > 2:
        tiles = tl.cdiv(n1, BLOCK_N)
        if (which == 1) & (tile >= tiles):
            which = 2
            rows = n2
            column = n0 + n1
            tile -= tiles
    return which, rows, column, tile


@triton.jit
def pick(which, p0_ptr, p1_ptr, p2_ptr, WEIGHTS: tl.constexpr):
    """The pointer of weight number `which`."""
    chosen = p0_ptr
    if WEIGHTS > 1:
        if which == 1:
            chosen = p1_ptr
    if WEIGHTS > 2:
        if which == 2:
            chosen = p2_ptr
    return chosen


@triton.jit
def weight_tile(pointers, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile `[BLOCK_N, BLOCK]` from column `first` on. A weight is read once a launch: it need not stay in the cache."""
    if WIDTH % BLOCK == 0:
        return tl.load(pointers + first, eviction_policy="evict_first")
    column = first + tl.arange(0, BLOCK)
    return tl.load(pointers + first, mask=(column < WIDTH)[None, :], other=0, eviction_policy="evict_first")
