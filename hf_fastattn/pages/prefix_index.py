"""`PrefixIndex`: which pages hold which tokens after which others, so that a prompt finds what was computed before.

A tree as in RadixAttention (Zheng et al., 2024, "SGLang"): a page is found by the page before it and by its own tokens,
which are compared in full, so that no two prompts are ever mistaken for each other.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.shared_runs import common_pages

# Pages after the last one found whole that are compared token by token, the newest ones.
MOST_COMPARED = 16
TOKEN_BYTES = 8


class RowTokens:
    """The tokens of one row, as keys of an index.

    Args:
        ids: `[n]` int64.
        page_size: tokens a page.
        before: another row, and how many whole pages the two have in common.
    """

    _compared: tuple[RowTokens, int] | None = None

    def __init__(self, ids: NDArray[np.int64], page_size: int, before: tuple[RowTokens, int] | None = None) -> None:
        self.ids, self._page_size, self._before = ids, page_size, before

    @functools.cached_property
    def keys(self) -> list[bytes]:
        """The tokens of each page; the last one may be of fewer than a page holds."""
        known = [] if self._before is None else self._before[0].keys[: self._before[1]]
        return known + _cut(self.ids[len(known) * self._page_size :], self._page_size)

    def __len__(self) -> int:
        return len(self.ids)

    def common(self, other: RowTokens) -> int:
        """How many first tokens are the same in both rows; of the row that was asked about last it is known."""
        if self._compared is None or self._compared[0] is not other:
            self._compared = other, common_tokens(self.ids, other.ids)
        return self._compared[1]

    def follow(self, other: RowTokens) -> None:
        """What the row has in common with another is not cut into pages again."""
        self._before = other, self.common(other) // self._page_size

    def longer(self, new: NDArray[np.int64], count: int) -> LongerRow:
        """The first `count` tokens, at least as many as there are, of this row and `new` ones after it."""
        known = len(self.ids) // self._page_size
        rest = np.concatenate((self.ids[known * self._page_size :], new))[: count - known * self._page_size]
        return LongerRow(self.keys[:known] + _cut(rest, self._page_size))


class LongerRow(NamedTuple):
    """The tokens of a row as keys alone: thousands of tokens need not be copied for a few more."""

    keys: list[bytes]


def _cut(ids: NDArray[np.int64], page_size: int) -> list[bytes]:
    """The bytes of each page of tokens."""
    raw, width = ids.tobytes(), page_size * ids.itemsize
    return [raw[start : start + width] for start in range(0, len(raw), width)]


def common_tokens(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many first entries are the same."""
    count = min(len(one), len(other))
    differ = one[:count] != other[:count]
    first = int(differ.argmax()) if count else 0
    return first if count and differ[first] else count


def rows_of_tokens(ids: Sequence[NDArray[np.int64]], page_size: int) -> list[RowTokens]:
    """The rows; what a row has in common with the one before it is not cut into pages again."""
    rows: list[RowTokens] = []
    for own in ids:
        row = RowTokens(own, page_size)
        if rows:
            row.follow(rows[-1])
        rows.append(row)
    return rows


class PrefixIndex:
    """Pages that stay for prompts to come; an owner of each of them, as a page table is.

    The pages are the truth about what the index holds. Every change is made so that an exception, Ctrl-C included, between
    two statements leaves a tree in which each page that can be found is held; owners are counted anew after it.

    Args:
        pool: the pages'.
        page_size: tokens a page.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool, self.page_size = pool, page_size
        self.evicted = 0
        # By page, or by a negative number for a beginning: the pages that follow it, by their tokens.
        self._after: dict[int, dict[bytes, int]] = {}
        # Pages, or beginnings, that a page with less than it has place for has ever followed.
        self._before_parts: set[int] = set()
        # By page what it follows and its tokens; the least recently used one first, none before the pages that follow it.
        self._held: OrderedDict[int, tuple[int, bytes]] = OrderedDict()
        # Pages of rows whose insertion does not count as use yet.
        self._inserted: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def rows(self) -> list[list[int]]:
        """The pages, as the rows of a page table."""
        return [list(self._held)]

    def forget_derived(self) -> None:
        """Nothing is derived from the pages but the tree, which is never ahead of them."""

    def match(self, root: int, row: RowTokens, near: tuple[list[int], int] | None = None) -> tuple[list[int], int]:
        """The pages that hold the first tokens of a row, and how many tokens; all of the row's but its last one at most.

        Args:
            root: a negative number, which stands for everything that the pages depend on but their tokens.
            near: the whole pages of another match, and how many whole pages its row has in common with this one.
        """
        most, size = len(row) - 1, self.page_size
        pages: list[int] = [] if near is None else near[0][: min(near[1], most // size)]
        before = pages[-1] if pages else root
        for key in row.keys[len(pages) : most // size]:
            page = self._after.get(before, {}).get(key)
            if page is None:
                break
            pages.append(page)
            before = page
        tokens = len(pages) * size
        # Less than a page is not worth the copy of it.
        page, more = self._partly(before, row.ids[tokens : min(tokens + size, most)]) if pages else (-1, 0)
        return (pages + [page], tokens + more) if more else (pages, tokens)

    def _partly(self, before: int, ids: NDArray[np.int64]) -> tuple[int, int]:
        """The page after `before` that begins with most of `ids`, and with how many of them."""
        best = (-1, 0)
        after = self._after.get(before, {}) if len(ids) else {}
        first = ids[:1].tobytes()
        for key, page in islice(reversed(after.items()), MOST_COMPARED):
            if key.startswith(first):
                best = max(best, (page, common_tokens(np.frombuffer(key, np.int64), ids)), key=lambda found: found[1])
        return best

    def touch(self, paths: Iterable[Sequence[int]]) -> None:
        """The pages of these matches are used now."""
        order: dict[int, None] = {}
        last: Sequence[int] = []
        for pages in paths:
            order.update(dict.fromkeys(pages[common_pages(last, pages) :]))
            last = pages
        for page in reversed(order):
            if page in self._held:
                self._held.move_to_end(page)

    def insert(
        self,
        root: int,
        row: RowTokens | LongerRow,
        pages: Sequence[int],
        tokens: int,
        partial: bool = False,
        found: Sequence[int] = (),
    ) -> list[int]:
        """Hold the pages of a row's first tokens.

        Args:
            pages: the row's; those whose tokens are here already are not taken.
            tokens: that they hold.
            partial: take a last page with fewer tokens than it has place for, too; its row must not write to it any more.
            found: whole pages of the index that hold the row's first tokens, as a match or an earlier insertion gave them.

        Returns:
            The pages of the index that hold the tokens.
        """
        size, path = self.page_size, list(found) if found and found[-1] in self._held else []
        before = path[-1] if path else root
        for column in range(len(path), min(tokens // size, len(pages))):
            page = self._added(before, row.keys[column], pages[column])
            if page is None:
                break
            path.append(page)
            before = page
        rest = tokens % size
        if partial and rest and len(path) == tokens // size and path:
            key = row.keys[len(path)][: rest * TOKEN_BYTES]
            if len(path) < len(pages) and not any(other.startswith(key) for other in self._after.get(before, {})):
                self._before_parts.add(before)
                last = self._added(before, key, pages[len(path)])
                path += [] if last is None else [last]
        self._inserted.append(path)
        return path

    def touch_inserted(self) -> None:
        """What was inserted is used now; all of it at once, since rows have most of their pages in common."""
        inserted, self._inserted = self._inserted, []
        self.touch(inserted)

    def _added(self, before: int, key: bytes, page: int) -> int | None:
        """The page that holds the tokens `key` after `before`, which is `page` if there was none; None if it can't be."""
        known = self._after.setdefault(before, {})
        if key in known:
            return known[key]
        if page < 0 or page in self._held:
            return None
        # Whole pages with other tokens are no parts of this one.
        parts = [other for other in known if key.startswith(other)] if before in self._before_parts else []
        noted, self.pool.unsettled = self.pool.unsettled, True
        self.pool.fork([page])
        # Pages that follow it now follow what it held before.
        self._after.pop(page, None)
        self._held[page] = (before, key)
        known[key] = page
        self.pool.unsettled = noted
        for other in parts:
            self._drop(known[other])
        return page

    def _drop(self, page: int) -> None:
        before, key = self._held[page]
        noted, self.pool.unsettled = self.pool.unsettled, True
        after = self._after.get(before, {})
        # Not to be found any more, before it is let go.
        if after.get(key) == page:
            del after[key]
        if not after:
            self._after.pop(before, None)
        self._after.pop(page, None)
        del self._held[page]
        self.pool.release([page])
        self.pool.unsettled = noted

    def evict(self, count: int) -> None:
        """Let pages go, the least recently used ones first, until `count` of them are free or none is left."""
        self.touch_inserted()
        while count > 0 and self._held:
            page = next(iter(self._held))
            self._drop(page)
            self.evicted += 1
            count -= not self.pool.owners(page)

    def trim(self, most: int) -> None:
        """Hold `most` pages at most."""
        self.touch_inserted()
        while len(self._held) > most:
            self._drop(next(iter(self._held)))
            self.evicted += 1

    def clear(self) -> None:
        """Let all pages go."""
        while self._held:
            self._drop(next(iter(self._held)))
        self._after.clear()
        self._before_parts.clear()
        self._inserted.clear()
