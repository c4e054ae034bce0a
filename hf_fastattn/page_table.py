"""`PageTable`: the pages of the rows of one cache, in one page group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from hf_fastattn.counters import CallCounters
from hf_fastattn.pages import PagePool
from hf_fastattn.table_mirror import TableMirror

# A growing sequence gets this much room after it, at most, before another may settle there.
MAX_ROOM_TOKENS = 2048


class PageTable:
    """Rows of pages: column `c` of a row holds its tokens `c * P` to `(c + 1) * P - 1`, or -1 once released.

    Args:
        pool: where the pages come from.
        page_size: tokens a page (P).
        window: keys a query sees, itself included; `None` for all. Pages that no later query can see are released.
    """

    def __init__(self, pool: PagePool, page_size: int, window: int | None = None) -> None:
        self.pool = pool
        self.page_size = page_size
        self.window = window
        self.rows: list[list[int]] = []
        # Columns that a row is known to share with the rows of the same origin; see `prefixes`.
        self._origin: list[tuple[int, int]] = []
        self._mirror = TableMirror()
        # Tokens that every row can append to pages which it has and owns alone.
        self._slack = 0
        # Until a row has this length, no row has a page to release behind its window.
        self._release_at = 0

    def add_rows(self, count: int) -> None:
        """Append `count` empty rows."""
        first = len(self.rows)
        self.rows.extend([] for _ in range(count))
        self._origin.extend((first + row, 0) for row in range(count))
        self._mirror.add_rows(count)
        self._slack = 0

    def start_behind(self, columns: Sequence[int]) -> None:
        """Empty rows begin after `columns[b]` pages that count as released."""
        for row, count in enumerate(columns):
            self.rows[row] = [-1] * count
            self._mirror.changed(row, 0)

    def misses_pages(self, lengths: Sequence[int]) -> bool:
        """Whether a query after `lengths[b]` tokens would look for a page that was released behind its window."""
        if self.window is None:
            return False
        columns = [max(length - self.window + 1, 0) // self.page_size for length in lengths]
        return any(column < len(pages) and pages[column] < 0 for column, pages in zip(columns, self.rows, strict=True))

    def reserve(
        self,
        lengths: Sequence[int],
        targets: Sequence[int],
        room: int,
        counters: CallCounters,
        copy_pages: Callable[[list[tuple[int, int]]], None],
    ) -> None:
        """Give every row pages for its tokens `lengths[b]` to `targets[b] - 1`, owned by that row alone.

        Args:
            lengths: tokens that each row holds.
            targets: tokens that each row will hold.
            room: tokens that a row may reach; the pages are chosen so that it can grow in place.
            counters: where pages are counted.
            copy_pages: copies the contents of pages `(source, target)`: partial pages that were shared.

        Raises:
            CacheFullError: the pool is full. Rows are as before, but for pages reserved beyond their length.
        """
        growth = max((target - length for length, target in zip(lengths, targets, strict=True)), default=0)
        if growth <= self._slack:
            self._slack -= growth
            return
        self._slack = 0
        size = self.page_size
        fresh: list[int] = []
        for row, (length, target) in enumerate(zip(lengths, targets, strict=True)):
            pages = self.rows[row]
            if target == length:
                continue
            column = length // size
            if column < len(pages) and self.pool.owners(pages[column]) > 1:
                fresh.append(row)
                continue
            need = -(-target // size) - len(pages)
            if need <= 0:
                continue
            if not pages or pages[-1] < 0 or self.pool.owners(pages[-1]) > 1:
                fresh.append(row)
                continue
            self._mirror.changed(row, len(pages))
            pages.extend(self._take(need, pages[-1], counters))
        runs = self._fresh_runs(fresh, lengths, targets, room, counters)
        partial = [(row, run) for row, run in runs if lengths[row] % size]
        # Before the release: a source may lose its last owner by it.
        copy_pages([(self.rows[row][lengths[row] // size], run[0]) for row, run in partial])
        counters.pages_copied += len(partial)
        for row, run in runs:
            column = lengths[row] // size
            self.pool.release(self.rows[row][column:])
            self.rows[row][column:] = run
            self._mirror.changed(row, column)
        if all(target > length for length, target in zip(lengths, targets, strict=True)):
            self._slack = min(len(pages) * size - target for pages, target in zip(self.rows, targets, strict=True))

    def _fresh_runs(
        self,
        rows: list[int],
        lengths: Sequence[int],
        targets: Sequence[int],
        room: int,
        counters: CallCounters,
    ) -> list[tuple[int, list[int]]]:
        """New pages from the column of its next token on, for each of `rows`, at equal distances if possible."""
        if not rows:
            return []
        size = self.page_size
        counts = [-(-targets[row] // size) - lengths[row] // size for row in rows]
        reach = max(-(-min(room, targets[row] + MAX_ROOM_TOKENS) // size) - lengths[row] // size for row in rows)
        step = max([*counts, reach])
        runs = self.pool.allocate_rows(counts, step)
        counters.pages_allocated += sum(counts)
        return list(zip(rows, runs, strict=True))

    def _take(self, count: int, after: int, counters: CallCounters) -> list[int]:
        pages = self.pool.allocate(count, after=after)
        counters.pages_allocated += count
        return pages

    def pages_to_come(self, lengths: Sequence[int], room: int) -> int:
        """Pages that the rows need more to reach `room` tokens, or `MAX_ROOM_TOKENS` more if that is less."""
        size = self.page_size
        most = None if self.window is None else -(-self.window // size) + 1
        total = 0
        for length in lengths:
            # One more, for the page that is copied when it is shared.
            pages = -(-min(room, length + MAX_ROOM_TOKENS) // size) - length // size + 1
            total += max(pages if most is None else min(pages, most), 1)
        return total

    def select(self, indices: Sequence[int], counters: CallCounters) -> None:
        """Row b becomes a fork of row `indices[b]`; pages are shared until one of their owners writes."""
        selected = [list(self.rows[index]) for index in indices]
        for pages in selected:
            self.pool.fork(page for page in pages if page >= 0)
        held_before = sum(page >= 0 for pages in self.rows for page in pages)
        held_after = sum(page >= 0 for pages in selected for page in pages)
        for pages in self.rows:
            self.pool.release(page for page in pages if page >= 0)
        counters.pages_shared += max(held_after - held_before, 0)
        self._origin = self._origin_of(indices)
        self.rows = selected
        self._mirror.select(indices)
        self._slack = self._release_at = 0

    def fork_into(self, other: PageTable) -> None:
        """Give `other`, an empty table of the same pool, forks of all rows."""
        other.rows = [list(pages) for pages in self.rows]
        other._origin = list(self._origin)
        other._mirror.add_rows(len(self.rows))
        self._slack = 0
        for pages in other.rows:
            self.pool.fork(page for page in pages if page >= 0)

    def _origin_of(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        repeated = len(set(indices)) < len(indices)
        if all(columns == 0 for _, columns in self._origin) and repeated:
            # The first fork: what a row holds now in whole pages is what its copies will share.
            return [(index, len(self.rows[index])) for index in indices]
        return [self._origin[index] for index in indices]

    def prefixes(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        """`(first_row, last_row, columns)` of neighbouring rows whose first `columns` pages are the same.

        None behind a window, where rows of different lengths have released different pages, and nobody reads from the start.
        """
        found: list[tuple[int, int, int]] = []
        if self.window is not None:
            return found
        row = 0
        while row < len(self.rows):
            last = row + 1
            origin, columns = self._origin[row]
            while columns and last < len(self.rows) and self._origin[last][0] == origin:
                last += 1
            if columns and last - row > 1:
                # The page after the last whole one was copied by whoever wrote to it, and nobody may end inside.
                columns = min(columns, min(lengths[row:last]) // self.page_size)
                while columns and len({self.rows[r][columns - 1] for r in range(row, last)}) > 1:
                    columns -= 1
                if columns:
                    found.append((row, last, columns))
            row = last
        return found

    def trim(self, lengths: Sequence[int]) -> None:
        """Release the pages beyond `lengths[b]` tokens of each row."""
        self._slack = self._release_at = 0
        for row, (pages, length) in enumerate(zip(self.rows, lengths, strict=True)):
            keep = -(-length // self.page_size)
            if keep < len(pages):
                self.pool.release(page for page in pages[keep:] if page >= 0)
                del pages[keep:]
                self._mirror.changed(row, keep)

    def let_go(self, rows: Sequence[int]) -> None:
        """Release all pages of `rows`."""
        self._slack = self._release_at = 0
        for row in rows:
            self.pool.release(page for page in self.rows[row] if page >= 0)
            self.rows[row] = []
            self._mirror.changed(row, 0)

    def release_behind(self, lengths: Sequence[int]) -> None:
        """Release the pages that no query from `lengths[b]` on can see through the window."""
        if self.window is None or not lengths or max(lengths) < self._release_at:
            return
        first_seen = [max(length - self.window + 1, 0) for length in lengths]
        # Rows that grow at different speeds may release a page some steps late, never early.
        self._release_at = max(lengths) + min(self.page_size - first % self.page_size for first in first_seen)
        for pages, first in zip(self.rows, first_seen, strict=True):
            column = first // self.page_size
            for behind in range(min(column, len(pages)) - 1, -1, -1):
                if pages[behind] < 0:
                    break
                self.pool.release([pages[behind]])
                pages[behind] = -1

    def clear(self) -> None:
        """Release everything; no rows remain."""
        for pages in self.rows:
            self.pool.release(page for page in pages if page >= 0)
        self.rows, self._origin, self._mirror = [], [], TableMirror()
        self._slack = self._release_at = 0

    # ---- as arrays --------------------------------------------------------------------------------------------

    def as_array(self) -> tuple[NDArray[np.int32], int]:
        """`[rows, columns]` int32 pages, arbitrary where there is none, and a number that tells two contents apart."""
        pages = self._mirror.update(self.rows)
        return pages, self._mirror.version

    def newest_slots(self, lengths: NDArray[np.int32]) -> NDArray[np.int32]:
        """`[rows]` int32 slots `page * P + offset` of the last of the `lengths[b]` tokens of each row."""
        columns, offsets = np.divmod(lengths - 1, self.page_size)
        pages = self._mirror.update(self.rows)
        return pages[np.arange(len(lengths)), columns] * self.page_size + offsets
