"""Gluon: the work items of the experts' products on Hopper, and how their rows are stored."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def work_item(work, t, TILES_N: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Expert, number of the weight rows, first pair and pairs of work item `t`."""
    entry = work + t // TILES_N * 4
    expert = gl.load(entry)
    inside = t - gl.load(entry + 1) * TILES_N
    count = gl.load(entry + 3)
    # A group of tiles of pairs with the first weight rows, then the same with the next ones.
    first = inside // (GROUP * TILES_N) * GROUP
    inside -= first * TILES_N
    width = gl.minimum((count + BLOCK_M - 1) // BLOCK_M - first, GROUP)
    n = inside // width
    m = (first + inside - n * width) * BLOCK_M
    return expert, n, gl.load(entry + 2) + m, gl.minimum(count - m, BLOCK_M)


@gluon.jit
def store_rows(y, y_s, y_ptr, row, inside, first, ROWS: gl.constexpr, STORE: gl.constexpr):
    """`y: [64, BLOCK_N]` to columns from `first` on of the rows `row: [64]`, through shared memory, 16 bytes a thread."""
    y_s.store(y.to(y_s.dtype))
    y = y_s.load(STORE)
    column = first + gl.arange(0, y.shape[1], gl.SliceLayout(0, STORE))
    to = y_ptr + gl.expand_dims(row.to(gl.int64) * ROWS, 1) + gl.expand_dims(column, 0)
    gl.store(to, y, mask=gl.expand_dims(inside, 1) & gl.expand_dims(column < ROWS, 0))
