"""`ReadPlan`: what a batch has to read from the pages of one page group, computed once for all layers.

The page tables live on the host, so the plan costs no device work: it names strided views where a sequence's pages are
adjacent, token gathers where they are not, and shared prefixes as one block for all the rows that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

# Fewest avoided key reads for which a shared prefix pays for its extra merge.
MIN_SHARED_TOKENS = 128


@dataclass(frozen=True)
class Run:
    """Tokens `start .. start + length - 1` of one row, by their slots `page * P + offset`.

    `first_slot` is set where the slots are adjacent; else `pages` are the pages from that of token `start` on.
    """

    start: int
    length: int
    first_slot: int | None
    pages: Sequence[int] = ()


@dataclass(frozen=True)
class SharedPrefix:
    """Rows `first_row .. last_row - 1`, whose first `run.length` tokens lie in the same pages."""

    first_row: int
    last_row: int
    run: Run


@dataclass
class ReadPlan:
    """The reads of one forward over the pages of one page group.

    Args:
        pages: page table, a list of pages a row.
        query_lens: new tokens a row.
        seq_lens: tokens a row after the append.
        page_size: tokens a page.
        window: keys a query sees, itself included; `None` for all.
        prefixes: `(first_row, last_row, pages)` of rows known to share their first pages.
    """

    pages: Sequence[list[int]]
    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    page_size: int
    window: int | None = None
    prefixes: Sequence[tuple[int, int, int]] = ()
    _indices: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def cu_seqlens_q(self) -> list[int]:
        """Where each row's queries begin, `[B + 1]`."""
        bounds = [0]
        for length in self.query_lens:
            bounds.append(bounds[-1] + length)
        return bounds

    @cached_property
    def is_decode(self) -> bool:
        """Every row has one new token."""
        return all(length == 1 for length in self.query_lens)

    @cached_property
    def shared(self) -> list[SharedPrefix]:
        """Prefixes that are worth a pass of their own; only for decode without a window."""
        if not self.is_decode or self.window is not None:
            return []
        found = []
        for first_row, last_row, columns in self.prefixes:
            tokens = columns * self.page_size
            if tokens * (last_row - first_row - 1) >= MIN_SHARED_TOKENS:
                found.append(SharedPrefix(first_row, last_row, self._run(first_row, 0, tokens)))
        return found

    @cached_property
    def rows(self) -> list[Run]:
        """The tokens that each row reads for itself: its window, less a shared prefix."""
        start = [self._first_visible(row) for row in range(len(self.seq_lens))]
        for prefix in self.shared:
            for row in range(prefix.first_row, prefix.last_row):
                start[row] = prefix.run.length
        return [self._run(row, first, self.seq_lens[row]) for row, first in enumerate(start)]

    @cached_property
    def strided(self) -> tuple[int, int, int] | None:
        """`(first slot, slots from row to row, length)` if all rows are equally long runs at equal distances."""
        rows = self.rows
        if any(run.first_slot is None or run.length != rows[0].length for run in rows) or not rows[0].length:
            return None
        starts = [run.first_slot or 0 for run in rows]
        step = starts[1] - starts[0] if len(starts) > 1 else 0
        regular = step >= 0 and all(b - a == step for a, b in zip(starts, starts[1:], strict=False))
        return (starts[0], step, rows[0].length) if regular else None

    def slots_of(self, run: Run, device: torch.device) -> torch.Tensor:
        """The slots of a scattered run as an int64 tensor on `device`."""
        key = (f"run {id(run)}", device)
        if key not in self._indices:
            pages = torch.tensor(run.pages, dtype=torch.int64)[:, None]
            slots = (pages * self.page_size + torch.arange(self.page_size)).flatten()
            skip = run.start % self.page_size
            self._indices[key] = slots[skip : skip + run.length].to(device)
        return self._indices[key]

    def bias(self, rows: tuple[int, int], keys: tuple[int, int], device: torch.device) -> torch.Tensor | None:
        """0 where a query of absolute positions `rows` sees a key of positions `keys`, else -inf; None if all do."""
        (q_lo, q_hi), (k_lo, k_hi) = rows, keys
        if k_hi - 1 <= q_lo and (self.window is None or k_lo > q_hi - 1 - self.window):
            return None
        name = (f"bias {q_lo} {q_hi} {k_lo} {k_hi}", device)
        if name not in self._indices:
            query = torch.arange(q_lo, q_hi, device=device)[:, None]
            key = torch.arange(k_lo, k_hi, device=device)[None]
            hidden = key > query
            if self.window is not None:
                hidden |= key <= query - self.window
            zeros = torch.zeros(hidden.shape, device=device)
            self._indices[name] = zeros.masked_fill(hidden, float("-inf"))
        return self._indices[name]

    def _first_visible(self, row: int) -> int:
        if self.window is None:
            return 0
        first_query = self.seq_lens[row] - self.query_lens[row]
        return max(first_query - self.window + 1, 0)

    def _run(self, row: int, start: int, stop: int) -> Run:
        size, pages = self.page_size, self.pages[row]
        first, last = start // size, -(-stop // size)
        held = pages[first:last]
        if stop <= start:
            return Run(start, 0, 0)
        if held == list(range(held[0], held[0] + len(held))):
            return Run(start, stop - start, held[0] * size + start - first * size)
        return Run(start, stop - start, None, held)
