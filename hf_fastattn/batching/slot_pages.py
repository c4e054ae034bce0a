"""`SlotPages`: the pages of the slots of a running batch, in every page group, and how many more there may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.batch_tensors import HostBatch
from hf_fastattn.cache.by_window import ByWindow
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.prefix_store import PrefixStore
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.pages.page_group import PageGroup

# Pages that move cost a copy of all of them, and steps recorded anew: the pool grows by this share at least.
GROWTH = 0.5


class SlotPages:
    """A paged cache whose rows are slots: each is empty, or holds the tokens of one request.

    Args:
        cache: empty; its rows become the slots.
        slots: how many.
        most_tokens: that all slots may hold, None where only the pools limit it.
        store: finds pages that prompts begin with; None where none is looked for.
        root: for its index.
    """

    def __init__(self, cache: PagedCache, slots: int, most_tokens: int | None, store: PrefixStore | None, root: int) -> None:
        self.cache, self.counters, self.page_size = cache, cache.counters, cache.groups.page_size
        self.store, self.root = store, root
        self.has_windows = any(window is not None for window in cache.tables)
        self._most = None if most_tokens is None else max(most_tokens // self.page_size, 1)
        # As many pages as there was memory for.
        self._likely: int | None = None
        for table in cache.tables.values():
            table.add_rows(slots)
        cache.lengths = [0] * slots
        # `(window's place, slot, first column, pages)` that the device does not know of.
        self.changes: list[tuple[int, int, int, list[int]]] = []
        # By window: columns of each slot up to which pages were released.
        self._behind = np.zeros((len(cache.tables), slots), np.int64)

    @property
    def most(self) -> int | None:
        """Most pages that a page group may hold."""
        limits = [group.pool.max_pages for group in self.cache.groups] + [self._most]
        return min((limit for limit in limits if limit is not None), default=None)

    def give_up_memory(self) -> None:
        """There was no memory for more pages than there are; no slot holds any. A request alone may try again."""
        if self.store is not None:
            self.store.index.clear()
        for group in self._groups():
            group.pool.shrink(group.storage.capacity)
            self._likely = group.storage.capacity if self._likely is None else min(self._likely, group.storage.capacity)

    def can_take(self, pages: int, alone: bool = False) -> bool:
        """Whether every page group has so many pages for the taking, after letting go of those kept for prompts to come.

        Args:
            alone: nobody else would make place.
        """
        most = self.most
        if not alone and self._likely is not None:
            most = self._likely if most is None else min(most, self._likely)
        return most is None or all(self._can_take(group, pages, most) for group in self._groups())

    def _can_take(self, group: PageGroup, pages: int, most: int) -> bool:
        missing = group.pool.in_use + pages - most
        if missing > 0 and self.store is not None:
            self.store.index.evict(missing)
        return group.pool.in_use + pages <= most

    def expect(self, pages: int) -> None:
        """Let there be so many free pages, as far as the limits allow, before steps are recorded over them."""
        for group in self._groups():
            most = self.most
            group.ensure(pages if most is None else max(min(pages, most - group.pool.in_use), 0))

    def columns(self, slot: int) -> int:
        """Pages that a slot has had so far."""
        return len(next(iter(self.cache.tables.values())).rows[slot])

    def begin(self, slot: int, pages: Sequence[int]) -> None:
        """A slot begins with pages that others hold too."""
        self.cache.tables[None].share_row(slot, pages, self.counters)
        self._note(slot, 0)

    def extend(self, slot: int, pages: int) -> None:
        """Give a slot so many pages more, which `can_take` has found."""
        first = self.columns(slot)
        for group, table in zip(self._groups(), self.cache.tables.values(), strict=True):
            if pages > group.pool.free:
                self._make_free(group, pages)
            table.extend_row(slot, pages, self.counters)
        self._note(slot, first)

    def _make_free(self, group: PageGroup, pages: int) -> None:
        """Have so many free pages: those that only prompts to come might read, or new ones."""
        pool = group.pool
        idle = 0 if self.store is None else sum(pool.owners(page) == 1 for page in self.store.index.rows[0])
        if idle >= pages and self.store is not None:
            self.store.index.evict(max(pages - pool.free, idle // 4))
        if pages > pool.free:
            most = pool.in_use + pages + int(pool.capacity * GROWTH)
            group.ensure(max((most if self.most is None else min(most, self.most)) - pool.in_use, pages))

    def release(self, slots: Sequence[int]) -> None:
        """These slots are empty."""
        self._behind[:, list(slots)] = 0
        for table in self.cache.tables.values():
            table.release_rows(slots)

    def move(self, source: int, target: int) -> None:
        """An empty slot holds what another one held."""
        self._behind[:, target], self._behind[:, source] = self._behind[:, source], 0
        for table in self.cache.tables.values():
            table.move_row(source, target)
        self._note(target, 0)

    def release_behind(self, lengths: NDArray[np.int64]) -> None:
        """Release pages that no query from `lengths[slot]` on can see through a window."""
        for behind, (window, table) in zip(self._behind, self.cache.tables.items(), strict=True):
            if window is None:
                continue
            columns = np.maximum(lengths - window + 1, 0) // self.page_size
            slots = np.flatnonzero(columns > behind)
            if len(slots):
                table.release_columns(slots.tolist(), columns[slots].tolist())
                behind[slots] = columns[slots]

    def keep_prompt(self, slot: int, tokens: Any, found: Sequence[int]) -> list[int]:
        """Prompts to come find the pages of this one; returns those that hold it."""
        assert self.store is not None
        row = self.cache.tables[None].rows[slot]
        return self.store.index.insert(self.root, tokens, row, len(tokens), found=found)

    def _note(self, slot: int, first: int) -> None:
        for place, table in enumerate(self.cache.tables.values()):
            self.changes.append((place, slot, first, table.rows[slot][first:]))

    def all_changes(self, slots: Sequence[int]) -> None:
        """The device knows nothing of these slots."""
        self.changes.clear()
        for slot in slots:
            self._note(slot, 0)

    def _groups(self) -> list[PageGroup]:
        return [self.cache.groups.group(window) for window in self.cache.tables]

    # ---- what a forward reads and writes ----------------------------------------------------------------------

    @property
    def options(self) -> BatchOptions:
        """What forwards run on."""
        groups = self.cache.groups
        return BatchOptions(groups.backend, groups.batch_invariant, groups.workspaces)

    def batch(self, slots: Sequence[int], before: Sequence[int], counts: Sequence[int]) -> Batch:
        """The batch of a forward of `counts[i]` new tokens of slot `slots[i]`, which holds `before[i]`."""
        after = [have + count for have, count in zip(before, counts, strict=True)]
        tables, size = self.cache.tables, self.page_size

        def plan(window: int | None) -> ReadPlan:
            rows = tables[window].rows
            return ReadPlan([rows[slot] for slot in slots], list(counts), after, size, window)

        def places(window: int | None) -> Any:
            return self.places(window, slots, before, after)

        host = HostBatch(list(counts), after, ByWindow(tables, plan), ByWindow(tables, places))
        return Batch.from_host(host, self.options)

    def places(
        self, window: int | None, slots: Sequence[int], before: Sequence[int], after: Sequence[int]
    ) -> NDArray[np.int64]:
        """Where tokens `before[i]` to `after[i] - 1` of each slot are written: `page * P + offset`."""
        rows, size = self.cache.tables[window].rows, self.page_size
        found = [_places(rows[slot], have, last, size) for slot, have, last in zip(slots, before, after, strict=True)]
        return np.concatenate(found)

    def place_of(self, slot: int, token: int) -> list[int]:
        """By window, where a token of a slot is written: `page * P + offset`."""
        column, offset = divmod(token, self.page_size)
        return [table.rows[slot][column] * self.page_size + offset for table in self.cache.tables.values()]


def _places(pages: Sequence[int], first: int, last: int, size: int) -> NDArray[np.int64]:
    """Where tokens `first` to `last - 1` of a row are written: `page * P + offset`."""
    tokens = np.arange(first, last)
    held = np.asarray(pages[first // size : -(-last // size)], np.int64)
    place: NDArray[np.int64] = held[tokens // size - first // size] * size + tokens % size
    return place
