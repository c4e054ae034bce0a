"""`PageGroup`: the pages of all layers with one attention window; and `Holder`: a cache that holds pages."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.page_storage import PageStorage
from hf_fastattn.pages.page_table import PageTable


@dataclass(frozen=True)
class PageGroup:
    """Layers that see the same keys: they share page numbers, tables and counts."""

    window: int | None
    pool: PagePool
    storage: PageStorage

    def copy_pages(self, moves: list[tuple[int, int]]) -> None:
        """Copy pages `(source, target)` in every layer of the group."""
        self.storage.copy(moves, self.pool.capacity)

    def grow_storage(self) -> None:
        """Give every page of the pool its place in the tensors of all layers."""
        self.storage.grow(self.pool.capacity)


class Holder(weakref.ref[Any]):
    """A cache, as the groups know it, and its page tables by window, which outlive it until they are cleared."""

    __slots__ = ("tables",)
    tables: dict[int | None, PageTable]
