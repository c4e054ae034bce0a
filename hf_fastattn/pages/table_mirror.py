"""`TableMirror`: the rows of a page table as one array, kept up to date a few entries at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_fastattn.pages.shared_runs import common_pages

_versions = itertools.count(1)


class TableMirror:
    """`[rows, columns]` int32 pages of a table that is changed elsewhere.

    Entries past the end of a row, and of columns that were released, are arbitrary: nobody reads them.

    Attributes:
        version: another number whenever an entry that somebody may read is another one; no two mirrors share one.
    """

    def __init__(self) -> None:
        self._pages: NDArray[np.int32] = np.zeros((0, 0), np.int32)
        # For each row, how many leading entries of the array are up to date.
        self._valid: list[int] = []
        self._stale = False
        self.version = next(_versions)

    def add_rows(self, count: int) -> None:
        """Append `count` empty rows."""
        self._valid.extend([0] * count)
        self._stale = True

    def changed(self, row: int, column: int) -> None:
        """The pages of `row` from `column` on are others, more or fewer than before."""
        self._valid[row] = min(self._valid[row], column)
        self._stale = True

    def selected(self, indices: Sequence[int]) -> TableMirror:
        """Another one, whose row b is what row `indices[b]` of this one is."""
        other = TableMirror()
        other.add_rows(len(indices))
        if len(self._pages) == len(self._valid):
            other._pages = self._pages[list(indices)]
            other._valid = [self._valid[index] for index in indices]
        return other

    def update(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        """The array for `rows`, the table's."""
        if self._stale:
            self._fit(len(rows), max(map(len, rows), default=0))
            before: Sequence[int] = ()
            for row, pages in enumerate(rows):
                first = self._valid[row]
                if first < len(pages):
                    # What two rows begin with is copied within the array, which is quicker than from a list.
                    same = common_pages(before, pages) if not first else 0
                    self._pages[row, :same] = self._pages[row - 1, :same]
                    first += same
                    self._pages[row, first : len(pages)] = pages[first:]
                    self._valid[row] = len(pages)
                    self.version = next(_versions)
                before = pages
            self._stale = False
        return self._pages

    def _fit(self, rows: int, columns: int) -> None:
        if self._pages.shape[0] == rows and self._pages.shape[1] >= columns:
            return
        pages = np.zeros((rows, 1 << max(columns - 1, 15).bit_length()), np.int32)
        if self._pages.shape[0] == rows:
            pages[:, : self._pages.shape[1]] = self._pages
        else:
            self._valid = [0] * rows
        self._pages = pages
