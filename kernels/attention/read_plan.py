"""`ReadPlan`: what a batch has to read from the pages of one page group, computed once for all layers.

The page tables live on the host, so the plan costs no device work: it names strided views where a sequence's pages are
adjacent, token gathers where they are not, and shared prefixes as one block for all the rows that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_fastattn.kernels.attention.decode_reads import DecodeReads, Run, SharedPrefix

# Fewest elements of keys whose reading a shared prefix has to avoid, to pay for its extra pass and merge.
MIN_SHARED_ELEMENTS = 2**15


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
    _decodes: dict[int, DecodeReads] = field(default_factory=dict)

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
    def rows(self) -> list[Run]:
        """The tokens that each row reads: all, or those in its window."""
        return [self._run(row, self._first_visible(row), length) for row, length in enumerate(self.seq_lens)]

    @cached_property
    def prefill(self) -> tuple[int, int, int] | None:
        """`DecodeReads.strided` of rows of equally many new tokens and keys; None where rows differ."""
        alike = self.query_lens[0] > 0 and len({*zip(self.query_lens, self.seq_lens, strict=True)}) == 1
        return DecodeReads([], self.rows, self.page_size, 0).strided if alike else None

    @cached_property
    def pages_read(self) -> int:
        """The number of the last page in the table, plus one."""
        return max((page for pages in self.pages for page in pages), default=-1) + 1

    def decode(self, width: int) -> DecodeReads:
        """The reads of a decode step.

        Args:
            width: elements of a token's keys.
        """
        if width not in self._decodes:
            shared = self._shared(width)
            rows = list(self.rows)
            for prefix in shared:
                for row in range(prefix.first_row, prefix.last_row):
                    rows[row] = self._run(row, prefix.run.length, self.seq_lens[row])
            self._decodes[width] = DecodeReads(shared, rows, self.page_size, width)
        return self._decodes[width]

    def _shared(self, width: int) -> list[SharedPrefix]:
        """Prefixes that are worth a pass of their own; only without a window."""
        if self.window is not None:
            return []
        found = []
        for first_row, last_row, columns in self.prefixes:
            tokens = columns * self.page_size
            if tokens * (last_row - first_row - 1) * width >= MIN_SHARED_ELEMENTS:
                found.append(SharedPrefix(first_row, last_row, self._run(first_row, 0, tokens)))
        return found

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
            return Run(start, stop - start, held[0] * size + start - first * size, held)
        return Run(start, stop - start, None, held)
