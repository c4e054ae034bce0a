"""Beams take over the keys and values of the beams that they continue, inside a decode step.

Row b goes on as row `parents[b]`. Full pages are never written again, so its page table names those of its parent. The
last page, if it is partly filled, is written next: the first row that continues a parent takes the parent's page, and each
further one a page of a parent that nobody continues, with a copy of the parent's tokens. There are always as many of these
as of those, so that every page has one writer and no copy reads what another one writes. Which rows own which pages does
not change on the host: all rows of a group hold theirs until the call ends.

The plain PyTorch version is `fork_reference.fork`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared

# Most beams of a prompt: a program compares all of them with each other.
MOST_BEAMS = 64


@dataclass(frozen=True)
class ForkTensors:
    """What a fork reads and writes, for R rows, `beams` neighbouring ones a prompt, W windows and T tensors of pages.

    Attributes:
        parents: `[R]` int64, the row that each row continues, one of the same prompt.
        tables: `[W, >= R, columns]` int32 page tables, changed.
        own: as `tables`, each row's own pages.
        seq_lens: `[>= R]` int32 tokens of each row, equal for the rows of a prompt.
        live: `[1]` int32; 0 leaves all pages as they are, for a run that is taken back.
        moves: `[W, R, 2]` int32, written: the page that is copied and where to, -1 where none is.
        places: `[T, 3]` int64: address of the pages, 8-byte words a page, index of their window.
        pages: the tensors themselves, each with the index of its window.
        beams: rows a prompt.
        page_size: tokens a page (P).
    """

    parents: Tensor
    tables: Tensor
    own: Tensor
    seq_lens: Tensor
    live: Tensor
    moves: Tensor
    places: Tensor
    pages: Callable[[], Sequence[tuple[int, Tensor]]]
    beams: int
    page_size: int


@triton.jit(do_not_specialize=["rows", "stride_table"])
def fork_tables_kernel(
    parents_ptr, tables_ptr, own_ptr, lens_ptr, live_ptr, moves_ptr, rows, columns, stride_table,
    BEAMS: tl.constexpr, BEAMS_BLOCK: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a prompt and window."""
    first = tl.program_id(0) * BEAMS
    window = tl.program_id(1).to(tl.int64)
    tables_ptr += window * stride_table
    own_ptr += window * stride_table
    beam = tl.arange(0, BEAMS_BLOCK)
    ok = beam < BEAMS
    row = (first + beam).to(tl.int64)
    parent = tl.load(parents_ptr + row, mask=ok, other=0).to(tl.int32) - first
    earlier = (beam[None, :] < beam[:, None]) & ok[None, :]
    # Rows whose parent an earlier row continues already, and beams that nobody continues.
    again = tl.max(((parent[:, None] == parent[None, :]) & earlier).to(tl.int32), 1)
    again = tl.where(ok, again, 0)
    continued = tl.max(((beam[:, None] == parent[None, :]) & ok[None, :]).to(tl.int32), 1)
    left = tl.where(ok & (continued == 0), 1, 0)
    nth_again = tl.sum(tl.where(earlier, again[None, :], 0), 1)
    nth_left = tl.sum(tl.where(earlier, left[None, :], 0), 1)
    fits = (left[None, :] != 0) & (nth_left[None, :] == nth_again[:, None])
    home = tl.where(again != 0, tl.sum(tl.where(fits, beam[None, :], 0), 1), parent)
    length = tl.load(lens_ptr + first)
    column = length // PAGE
    for start in range(0, column, BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = ok[:, None] & (place < column)[None, :]
        pages = tl.load(tables_ptr + (first + parent).to(tl.int64)[:, None] * columns + place[None, :], mask=there)
        # Rows read each other's entries before any of them writes.
        tl.debug_barrier()
        tl.store(tables_ptr + row[:, None] * columns + place[None, :], pages, mask=there)
    # A table that is full has no entry left to prepare.
    ok = ok & (column < columns)
    partial = length % PAGE != 0
    source = tl.load(tables_ptr + (first + parent).to(tl.int64) * columns + column, mask=ok, other=-1)
    page = tl.load(tables_ptr + (first + home).to(tl.int64) * columns + column, mask=ok, other=-1)
    page = tl.where(partial, page, tl.load(own_ptr + row * columns + column, mask=ok, other=-1))
    copies = (again != 0) & partial & (tl.load(live_ptr) != 0)
    tl.debug_barrier()
    tl.store(tables_ptr + row * columns + column, page, mask=ok)
    moves_ptr += 2 * (window * rows + row)
    tl.store(moves_ptr, tl.where(copies, source, -1), mask=ok)
    tl.store(moves_ptr + 1, page, mask=ok)


@triton.jit(do_not_specialize=["rows"])
def copy_pages_kernel(moves_ptr, places_ptr, rows, BLOCK: tl.constexpr):
    """One program a row and tensor of pages."""
    row = tl.program_id(0)
    places_ptr += 3 * tl.program_id(1)
    words, window = tl.load(places_ptr + 1), tl.load(places_ptr + 2)
    moves_ptr += 2 * (window * rows + row)
    source, target = tl.load(moves_ptr).to(tl.int64), tl.load(moves_ptr + 1).to(tl.int64)
    if source >= 0:
        pages = tl.load(places_ptr).to(tl.pointer_type(tl.int64))
        for start in range(0, words, BLOCK):
            word = start + tl.arange(0, BLOCK)
            there = word < words
            tl.store(pages + target * words + word, tl.load(pages + source * words + word, mask=there), mask=there)


def fork(state: ForkTensors) -> None:
    """Let rows go on as their parents; see `ForkTensors`.

    Raises:
        ValueError: there are more beams than the kernel takes.
    """
    rows, beams = state.parents.shape[0], state.beams
    if not 0 < beams <= MOST_BEAMS or rows % beams:
        raise ValueError(f"{rows} rows of {beams} beams: give 1 to {MOST_BEAMS} beams, and a multiple of them in rows")
    windows, _, columns = state.tables.shape
    with on_device_of(state.parents):
        prepared(fork_tables_kernel)[(rows // beams, windows)](
            state.parents, state.tables, state.own, state.seq_lens, state.live, state.moves, rows, columns,
            state.tables.stride(0), BEAMS=beams, BEAMS_BLOCK=power_of_2(beams), PAGE=state.page_size, BLOCK=64, num_warps=4,
        )  # fmt: skip
    copy_pages(state.moves, state.places)


def copy_pages(moves: Tensor, places: Tensor) -> None:
    """Copy pages in all tensors of a model in one launch.

    Args:
        moves: `[W, R, 2]` int32, of each window the pages that are copied and where to; -1: none. None is both.
        places: `[T, 3]` int64, the tensors: address, 8-byte words a page, index of the window.
    """
    rows = moves.shape[1]
    with on_device_of(moves):
        prepared(copy_pages_kernel)[(rows, places.shape[0])](moves, places, rows, BLOCK=1024, num_warps=4)
