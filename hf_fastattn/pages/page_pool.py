"""`PagePool`: who owns which page. Pure Python, no tensors, so that it can be tested anywhere.

The block allocator with reference counts and copy-on-write of PagedAttention (Kwon et al., 2023, "Efficient Memory
Management for Large Language Model Serving with PagedAttention"), with one addition: runs of adjacent pages are
preferred, so that a backend can read a sequence as one strided view instead of gathering it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


class CacheFullError(RuntimeError):
    """The pages asked for do not fit into the memory limit."""


@dataclass(frozen=True)
class Spare:
    """What a pool that has to grow takes beyond need.

    Attributes:
        share: of the pages that there are.
        least: pages, if that is more.
        most: pages in all up to which there is any spare; None for no bound.
    """

    share: float = 0.0
    least: int = 0
    most: int | None = None

    def capacity(self, now: int) -> int:
        """Pages that a pool of `now` should grow to, at least."""
        grown = now + max(int(now * self.share), self.least)
        return grown if self.most is None else min(grown, self.most)


class PagePool:
    """Page numbers `0 .. capacity - 1`, each free or held by one or more owners.

    Args:
        capacity: pages to begin with.
        max_pages: most pages the pool may grow to; `None` sets no limit.

    Raises:
        ValueError: `capacity` is negative or above `max_pages`.
    """

    def __init__(self, capacity: int = 0, max_pages: int | None = None) -> None:
        if capacity < 0 or (max_pages is not None and capacity > max_pages):
            raise ValueError(f"capacity={capacity} must lie between 0 and max_pages={max_pages}")
        self.max_pages = max_pages
        # Set while a table changes pages and rows. If an exception leaves it set, `recount` corrects the counts.
        self.unsettled = False
        # Called with how many pages the limit leaves too few: lets go of pages that somebody holds for later.
        self.reclaim: Callable[[int], None] | None = None
        # Where the pool has to grow.
        self.spare = Spare()
        self._held = bytearray(capacity)
        self._owners = [0] * capacity
        self._in_use = 0

    @property
    def capacity(self) -> int:
        """Pages that exist, free or held."""
        return len(self._held)

    @property
    def in_use(self) -> int:
        """Pages held by at least one owner."""
        return self._in_use

    @property
    def free(self) -> int:
        """Pages held by nobody."""
        return self.capacity - self._in_use

    def owners(self, page: int) -> int:
        """How many owners hold `page`; 0 if it is free."""
        return self._owners[page]

    def allocate(self, count: int, after: int | None = None, room: int | None = None) -> list[int]:
        """Take `count` free pages, each with one owner. The pool grows only if there are not as many.

        Args:
            count: pages to take.
            after: the page that the run should follow, if its neighbours are free.
            room: length of the free run to look for when starting anew, so that the sequence can go on growing in place.

        Returns:
            Page numbers, ascending and adjacent whenever such a run is free.

        Raises:
            ValueError: `count` is negative.
            CacheFullError: the pool may not grow far enough; nothing was taken.
        """
        if count < 0:
            raise ValueError(f"count={count} must not be negative")
        if count == 0:
            return []
        self.ensure(count)
        start = self._run(count, after, room or 0)
        return self._take(self._scattered(count) if start is None else list(range(start, start + count)))

    def _take(self, pages: list[int]) -> list[int]:
        for page in pages:
            self._held[page] = 1
            self._owners[page] = 1
        self._in_use += len(pages)
        return pages

    def allocate_rows(self, counts: list[int], spans: list[int]) -> list[list[int]]:
        """`counts[b]` pages for each of several sequences, the next one `spans[b]` pages on where there is such a run.

        Raises:
            CacheFullError: the pool may not grow far enough; nothing was taken.
        """
        self.ensure(sum(counts))
        start = self._held.find(bytes(sum(spans)))
        if start < 0:
            return self._rows_apart(counts, spans)
        runs = []
        for count, span in zip(counts, spans, strict=True):
            runs.append(self._take(list(range(start, start + count))))
            start += span
        return runs

    def _rows_apart(self, counts: list[int], spans: list[int]) -> list[list[int]]:
        runs: list[list[int]] = []
        try:
            for count, span in zip(counts, spans, strict=True):
                runs.append(self.allocate(count, room=span))
        except CacheFullError as full:
            for run in runs:
                self.release(run)
            raise CacheFullError(
                f"{sum(counts)} pages were asked for and {self.free} of at most {self.max_pages} are free"
            ) from full
        return runs

    def ensure(self, free: int) -> None:
        """Grow, within the limit, until at least `free` pages are free; by no page more, but for `spare`."""
        if self.max_pages is not None and self._in_use + free > self.max_pages and self.reclaim is not None:
            self.reclaim(self._in_use + free - self.max_pages)
        wanted = self._in_use + free
        if wanted > self.capacity:
            wanted = max(wanted, self.spare.capacity(self.capacity))
        extra = (wanted if self.max_pages is None else min(wanted, self.max_pages)) - self.capacity
        if extra > 0:
            # In one statement, so that an exception leaves either the old size or the new one.
            self.__dict__.update(_held=self._held + bytes(extra), _owners=self._owners + [0] * extra)

    def fork(self, pages: Iterable[int]) -> None:
        """Add an owner to each of `pages`, which must be held."""
        for page in pages:
            if not self._owners[page]:
                raise ValueError(f"page {page} is free; only a held page can be forked")
            self._owners[page] += 1

    def fork_often(self, counts: Mapping[int, int]) -> None:
        """Add `counts[page]` owners to each page, which must be held."""
        for page, count in counts.items():
            if not self._owners[page]:
                raise ValueError(f"page {page} is free; only a held page can be forked")
            self._owners[page] += count

    def release(self, pages: Iterable[int]) -> None:
        """Take an owner from each of `pages`; a page without owners is free again."""
        for page in pages:
            if not self._owners[page]:
                raise ValueError(f"page {page} is free already; it was released twice")
            self._owners[page] -= 1
            if not self._owners[page]:
                self._held[page] = 0
                self._in_use -= 1

    def release_often(self, counts: Mapping[int, int]) -> None:
        """Take `counts[page]` owners from each page; a page without owners is free again."""
        for page, count in counts.items():
            if self._owners[page] < count:
                raise ValueError(f"page {page} has {self._owners[page]} owners; it was released {count} times")
            self._owners[page] -= count
            if not self._owners[page]:
                self._held[page] = 0
                self._in_use -= 1

    def shrink(self, capacity: int) -> None:
        """Forget free pages from the end until `capacity` pages, or the last held page, are reached."""
        keep = max(capacity, self._held.rfind(1) + 1)
        if keep < self.capacity:
            self.__dict__.update(_held=self._held[:keep], _owners=self._owners[:keep])

    def recount(self, rows: Iterable[Iterable[int]]) -> None:
        """Owners are those who hold pages in `rows`, and nobody else; -1 is no page."""
        owners = [0] * self.capacity
        for pages in rows:
            for page in pages:
                if page >= 0:
                    owners[page] += 1
        held = bytearray(map(bool, owners))
        # In one statement, so that an exception leaves either the old counts or the new ones.
        self.__dict__.update(_owners=owners, _held=held, _in_use=sum(held), unsettled=False)

    def _run(self, count: int, after: int | None, room: int) -> int | None:
        if after is not None:
            start = after + 1
            if start + count <= self.capacity and not any(self._held[start : start + count]):
                return start
        for length in (max(count, room), count):
            start = self._held.find(bytes(length))
            if start >= 0:
                return start
        return None

    def _scattered(self, count: int) -> list[int]:
        pages: list[int] = []
        page = self._held.find(0)
        while page >= 0 and len(pages) < count:
            pages.append(page)
            page = self._held.find(0, page + 1)
        if len(pages) < count:
            raise CacheFullError(f"{count} pages were asked for and {len(pages)} of at most {self.max_pages} are free")
        return pages
