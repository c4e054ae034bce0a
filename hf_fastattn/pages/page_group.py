"""`PageGroup`: the pages of all layers with one attention window; and `Holder`: a cache that holds pages."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.page_storage import PageStorage


class Holding(Protocol):
    """Rows of pages that count as held: a page table, or an index of pages."""

    @property
    def rows(self) -> Sequence[Sequence[int]]: ...
    def clear(self) -> None: ...
    def forget_derived(self) -> None: ...


@dataclass(frozen=True)
class PageGroup:
    """Layers that see the same keys: they share page numbers, tables and counts."""

    window: int | None
    pool: PagePool
    storage: PageStorage

    def copy_pages(self, moves: list[tuple[int, int]]) -> None:
        """Copy pages `(source, target)` in every layer of the group."""
        self.storage.copy(moves, self.pool.capacity)

    def ensure(self, free: int) -> None:
        """Have at least `free` free pages, if the limit allows; where no page is held, none is copied for that."""
        if free > self.pool.free and not self.pool.in_use:
            self.storage.clear()
        self.pool.ensure(free)

    def grow_storage(self, alike: Callable[[bool], bool] | None = None) -> None:
        """Give every page of the pool its place in the tensors of all layers; where memory is short, those that are held.

        Args:
            alike: whether something holds on all processes that compute the model or on none, whose pages stay the same.

        Raises:
            torch.OutOfMemoryError: there is no memory for those either, or on some processes only; what the tensors held
                they hold.
        """
        before, fits = self.pool.capacity, True
        try:
            self.storage.grow(self.pool.capacity)
        except torch.OutOfMemoryError:
            self.pool.shrink(self.storage.capacity)
            if alike is None and self.pool.capacity == before:
                raise
            fits = False
        # Not while the error is handled, whose frames hold tensors.
        if alike is not None and not alike(fits):
            where = "on another rank" if fits else "on this rank"
            raise torch.OutOfMemoryError(f"there is no memory for {before} pages of keys and values {where}")
        if not fits and self.pool.capacity == before:
            raise torch.OutOfMemoryError(f"there is no memory for {before} pages of keys and values on any rank")
        self.storage.grow(self.pool.capacity)


class Holder(weakref.ref[Any]):
    """A cache, as the groups know it, and its page tables by window, which outlive it until they are cleared."""

    __slots__ = ("tables",)
    tables: Mapping[int | None, Holding]
