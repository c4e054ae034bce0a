"""`PageTable`: the pages of the rows of one cache, in one page group."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from hf_fastattn.counters import CallCounters
from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.reach import BEHIND
from hf_fastattn.pages.shared_runs import page_counts, shared_runs
from hf_fastattn.pages.table_mirror import TableMirror
from hf_fastattn.stream_layout import StreamLayout

Params = ParamSpec("Params")
Result = TypeVar("Result")


def _noted(change: Callable[Concatenate[PageTable, Params], Result]) -> Callable[Concatenate[PageTable, Params], Result]:
    """While rows and pages change, the pool is unsettled; it stays so if an exception comes between."""

    @functools.wraps(change)
    def noted(self: PageTable, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        pool = self.pool
        before, pool.unsettled = pool.unsettled, True
        result = change(self, *args, **kwargs)
        pool.unsettled = before
        return result

    return noted


class PageTable:
    """Rows of pages: column `c` of a row holds its tokens `c * P` to `(c + 1) * P - 1`, or -1 once released.

    Its rows are the truth about who holds which page: every change of them is one assignment, and owners can be counted
    anew from them, so an exception, Ctrl-C included, may come between any two statements.

    Args:
        pool: where the pages come from.
        page_size: tokens a page (P).
        window: keys a query sees, itself included; `None` for all. Pages that no later query can see are released.
    """

    def __init__(self, pool: PagePool, page_size: int, window: int | None = None) -> None:
        self.pool = pool
        self.page_size = page_size
        self.window = window
        self._publish([], [], TableMirror())

    def _publish(self, rows: list[list[int]], origin: list[tuple[int, int]], mirror: TableMirror) -> None:
        """Other rows, in one step.

        Args:
            origin: columns that a row is known to share with the rows of the same origin; see `prefixes`.
        """
        self.rows: list[list[int]]
        self._origin: list[tuple[int, int]]
        self._mirror: TableMirror
        # Tokens that every row can append to pages which it has and owns alone.
        self._slack: int
        # No row has a page to release behind its window before the longest row has this length.
        self._release_at: int
        self.__dict__.update(rows=rows, _origin=origin, _mirror=mirror, _slack=0, _release_at=0)

    def forget_derived(self) -> None:
        """What is derived from the rows is derived anew."""
        mirror = TableMirror()
        mirror.add_rows(len(self.rows))
        self._publish(self.rows, self._origin, mirror)

    def add_rows(self, count: int) -> None:
        """Append `count` empty rows."""
        first, mirror = len(self.rows), self._mirror.selected(range(len(self.rows)))
        mirror.add_rows(count)
        origin = [(first + row, 0) for row in range(count)]
        self._publish(self.rows + [[] for _ in range(count)], self._origin + origin, mirror)

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
        ahead: int,
        counters: CallCounters,
        copy_pages: Callable[[list[tuple[int, int]]], None],
    ) -> None:
        """Give every row pages for its tokens `lengths[b]` to `targets[b] - 1`, owned by that row alone.

        Args:
            lengths: tokens that each row holds.
            targets: tokens that each row will hold.
            ahead: tokens beyond them that the pool gets pages for if it has to grow; rows are laid so that they can go on
                in place.
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
        self._reserve(lengths, targets, ahead, counters, copy_pages)
        if all(target > length for length, target in zip(lengths, targets, strict=True)):
            size = self.page_size
            self._slack = min(len(pages) * size - target for pages, target in zip(self.rows, targets, strict=True))

    @_noted
    def _reserve(
        self,
        lengths: Sequence[int],
        targets: Sequence[int],
        ahead: int,
        counters: CallCounters,
        copy_pages: Callable[[list[tuple[int, int]]], None],
    ) -> None:
        size = self.page_size
        if self.pages_to(lengths, targets, 0) > self.pool.free:
            self.pool.ensure(self.pages_to(lengths, targets, ahead))
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
        runs = self._fresh_runs(fresh, lengths, targets, ahead, counters)
        partial = [(row, run) for row, run in runs if lengths[row] % size]
        # Copy first: release() below may free the source page.
        copy_pages([(self.rows[row][lengths[row] // size], run[0]) for row, run in partial])
        counters.pages_copied += len(partial)
        for row, run in runs:
            column = lengths[row] // size
            self._mirror.changed(row, column)
            gone, self.rows[row][column:] = self.rows[row][column:], run
            self.pool.release(gone)

    def _fresh_runs(
        self,
        rows: list[int],
        lengths: Sequence[int],
        targets: Sequence[int],
        ahead: int,
        counters: CallCounters,
    ) -> list[tuple[int, list[int]]]:
        """New pages from the column of its next token on, for each of `rows`, with what is ahead left free behind them."""
        if not rows:
            return []
        size = self.page_size
        counts = [-(-targets[row] // size) - lengths[row] // size for row in rows]
        ends = [self._missing(row, lengths[row], targets[row], ahead) for row in rows]
        runs = self.pool.allocate_rows(counts, [max(pair) for pair in zip(counts, ends, strict=True)])
        counters.pages_allocated += sum(counts)
        return list(zip(rows, runs, strict=True))

    def _take(self, count: int, after: int, counters: CallCounters) -> list[int]:
        pages = self.pool.allocate(count, after=after)
        counters.pages_allocated += count
        return pages

    def pages_to(self, lengths: Sequence[int], targets: Sequence[int], ahead: int) -> int:
        """Free pages that rows of `lengths[b]` tokens need to hold `targets[b]`, and `ahead` more."""
        pairs = zip(lengths, targets, strict=True)
        return sum(self._missing(row, *pair, ahead) for row, pair in enumerate(pairs))

    def _missing(self, row: int, length: int, target: int, ahead: int) -> int:
        """Pages that a row has to get for `target` tokens and, if it has any, `ahead` more."""
        if not target:
            return 0
        size, pages = self.page_size, self.rows[row]
        column, reach = length // size, target + ahead
        # A shared page is exchanged for a copy when it is written.
        is_shared = reach > length and column < len(pages) and self.pool.owners(pages[column]) > 1
        owned = column if is_shared else len(pages)
        now, missing = -(-target // size) - owned, -(-reach // size) - owned
        if self.window is not None and missing > now:
            # What falls behind the window meanwhile makes place for what comes.
            spare = -(-(self.window + BEHIND) // size) + 1 - sum(page >= 0 for page in pages)
            missing = min(missing, spare) if spare > 0 else missing
        return max(missing, now, 0)

    @_noted
    def selected(self, indices: Sequence[int], counters: CallCounters) -> PageTable:
        """Another table, whose row b is a fork of row `indices[b]`; pages are shared until one of their owners writes."""
        other = PageTable(self.pool, self.page_size, self.window)
        rows = [list(self.rows[index]) for index in indices]
        self._slack = 0
        self.pool.fork_often(page_counts(rows))
        other._publish(rows, self._origin_of(indices), self._mirror.selected(indices))
        counters.pages_shared += max(other.held - self.held, 0)
        return other

    @_noted
    def slid(self, rows: Sequence[int], layout: StreamLayout, counters: CallCounters) -> PageTable:
        """Another table, in which the oldest pages of the full `rows` that are no sinks come last, to be written anew.

        Pages that others hold too are left to them, and new ones taken.

        Raises:
            CacheFullError: the pool is full.
        """
        other, first, count = PageTable(self.pool, self.page_size, self.window), layout.sinks, layout.leaving
        new, mirror, origin = list(map(list, self.rows)), self._mirror.selected(range(len(self.rows))), list(self._origin)
        leaving = {row: self.rows[row][first : first + count] for row in rows}
        owned = {row: [page for page in pages if self.pool.owners(page) == 1] for row, pages in leaving.items()}
        missing = sum(len(leaving[row]) - len(owned[row]) for row in rows)
        fresh = self.pool.allocate(missing) if missing else []
        counters.pages_allocated += missing
        kept = [list(pages) for pages in new]
        for row, pages in leaving.items():
            stay = [*self.rows[row][:first], *self.rows[row][first + count :], *owned[row]]
            lacks = len(pages) - len(owned[row])
            kept[row], new[row], fresh = stay, [*stay, *fresh[:lacks]], fresh[lacks:]
            mirror.changed(row, first)
            origin[row] = (origin[row][0], min(origin[row][1], first))
        self._slack = 0
        self.pool.fork_often(page_counts(kept))
        other._publish(new, origin, mirror)
        return other

    @_noted
    def owning(
        self,
        rows: Sequence[int],
        first: int,
        counters: CallCounters,
        copy_pages: Callable[[list[tuple[int, int]]], None],
    ) -> PageTable:
        """Another table, in which `rows` hold no page from column `first` on that another row or table holds too: copies.

        Raises:
            CacheFullError: the pool is full.
        """
        other, new = PageTable(self.pool, self.page_size, self.window), list(map(list, self.rows))
        shared = [
            (row, column) for row in rows for column in range(first, len(new[row])) if self.pool.owners(new[row][column]) > 1
        ]
        fresh = self.pool.allocate(len(shared)) if shared else []
        counters.pages_allocated += len(shared)
        counters.pages_copied += len(shared)
        copy_pages([(new[row][column], page) for (row, column), page in zip(shared, fresh, strict=True)])
        mirror, origin = TableMirror(), list(self._origin)
        mirror.add_rows(len(new))
        for (row, column), page in zip(shared, fresh, strict=True):
            new[row][column] = page
            origin[row] = (origin[row][0], min(origin[row][1], first))
        self._slack = 0
        taken = set(fresh)
        self.pool.fork_often(page_counts([[page for page in pages if page not in taken] for pages in new]))
        other._publish(new, origin, mirror)
        return other

    @property
    def held(self) -> int:
        """Entries of the rows that are pages."""
        return sum(len(pages) - pages.count(-1) for pages in self.rows)

    @_noted
    def hold(self, rows: Sequence[Sequence[int]]) -> None:
        """An empty table takes these rows of pages, which others hold too."""
        held = [list(pages) for pages in rows]
        mirror = TableMirror()
        mirror.add_rows(len(held))
        self.pool.fork_often(page_counts(held))
        self._publish(held, shared_runs(held), mirror)

    @_noted
    def take_rows(self, sources: Sequence[tuple[PageTable, int]]) -> None:
        """An empty table takes rows of others of its pool, each once; these are empty after it."""
        rows = [table.rows[row] for table, row in sources]
        mirror = TableMirror()
        mirror.add_rows(len(rows))
        # Until all others are empty, rows have two owners; `unsettled` has them recounted if an exception comes.
        self._publish(rows, shared_runs(rows), mirror)
        for table in {id(table): table for table, _ in sources}.values():
            table._publish([], [], TableMirror())

    @property
    def shares_pages(self) -> bool:
        """Whether neighbouring rows are known to share pages."""
        return any(columns for _, columns in self._origin)

    def regroup(self) -> None:
        """Look anew at which neighbouring rows share pages."""
        if self.window is None:
            self._origin = shared_runs(self.rows)

    @_noted
    def fork_into(self, other: PageTable, lengths: Sequence[int]) -> None:
        """Give `other`, an empty table of the same pool, forks of the pages of `lengths[b]` tokens of each row."""
        rows = [pages[: -(-length // self.page_size)] for pages, length in zip(self.rows, lengths, strict=True)]
        mirror = TableMirror()
        mirror.add_rows(len(rows))
        self._slack = 0
        self.pool.fork_often(page_counts(rows))
        other._publish(rows, list(self._origin), mirror)

    def moved(self, pool: PagePool, places: Mapping[int, int]) -> PageTable:
        """The same table over pages of another pool: `places[page]` instead of `page`, held by nobody else."""
        other = PageTable(pool, self.page_size, self.window)
        rows = [[places.get(page, page) for page in pages] for pages in self.rows]
        mirror = TableMirror()
        mirror.add_rows(len(rows))
        other._publish(rows, list(self._origin), mirror)
        pool.recount(rows)
        return other

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
                # Only full pages stay shared, since a writer copies its partial page, and the prefix may not be longer
                # than the shortest row.
                columns = min(columns, min(lengths[row:last]) // self.page_size)
                while columns and len({self.rows[r][columns - 1] for r in range(row, last)}) > 1:
                    columns -= 1
                if columns:
                    found.append((row, last, columns))
            row = last
        return found

    @_noted
    def trim(self, lengths: Sequence[int]) -> None:
        """Release the pages beyond `lengths[b]` tokens of each row."""
        self._slack = self._release_at = 0
        for row, (pages, length) in enumerate(zip(self.rows, lengths, strict=True)):
            keep = -(-length // self.page_size)
            if keep < len(pages):
                self._mirror.changed(row, keep)
                self.pool.release(page for page in pages[keep:] if page >= 0)
                del pages[keep:]

    @_noted
    def extend_row(self, row: int, count: int, counters: CallCounters) -> None:
        """Append `count` new pages to one row.

        Raises:
            CacheFullError: the pool is full. The row is as before.
        """
        self._slack = 0
        pages = self.rows[row]
        fresh = self.pool.allocate(count, pages[-1] if pages else None)
        counters.pages_allocated += count
        self._mirror.changed(row, len(pages))
        pages.extend(fresh)

    @_noted
    def share_row(self, row: int, pages: Sequence[int], counters: CallCounters) -> None:
        """An empty row begins with whole pages that others hold too."""
        self.pool.fork(pages)
        self._mirror.changed(row, 0)
        self.rows[row] = list(pages)
        counters.pages_shared += len(pages)

    @_noted
    def move_row(self, source: int, target: int) -> None:
        """An empty row becomes what another one is, which is empty then."""
        for row in (source, target):
            self._mirror.changed(row, 0)
        self.rows[source], self.rows[target] = self.rows[target], self.rows[source]
        self._origin[source], self._origin[target] = (source, 0), (target, 0)

    @_noted
    def release_rows(self, rows: Sequence[int]) -> None:
        """Release all pages of `rows`."""
        self._slack = self._release_at = 0
        for row in rows:
            self._mirror.changed(row, 0)
            gone, self.rows[row] = self.rows[row], []
            self.pool.release(page for page in gone if page >= 0)

    def release_behind(self, lengths: Sequence[int]) -> None:
        """Release the pages that no query from `lengths[b]` on can see through the window."""
        if self.window is None or not lengths or max(lengths) < self._release_at:
            return
        first_seen = [max(length - self.window + 1, 0) for length in lengths]
        self._release_before(first_seen)
        # Rows that grow at different speeds may release a page some steps late, never early.
        self._release_at = max(lengths) + min(self.page_size - first % self.page_size for first in first_seen)

    def _release_before(self, first_seen: Sequence[int]) -> None:
        self.release_columns(range(len(self.rows)), [first // self.page_size for first in first_seen])

    @_noted
    def release_columns(self, rows: Sequence[int], columns: Sequence[int]) -> None:
        """Release the pages of `rows` in front of their `columns`."""
        for row, column in zip(rows, columns, strict=True):
            pages = self.rows[row]
            for behind in range(min(column, len(pages)) - 1, -1, -1):
                if pages[behind] < 0:
                    break
                self.pool.release([pages[behind]])
                pages[behind] = -1

    @_noted
    def clear(self) -> None:
        """Release everything; no rows remain."""
        rows = self.rows
        self._publish([], [], TableMirror())
        self.pool.release_often(page_counts(rows))

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
