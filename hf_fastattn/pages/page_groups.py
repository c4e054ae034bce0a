"""`PageGroups`: the pools and tensors of one model, one group for each distinct attention window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_fastattn.config import FastAttnConfig
from hf_fastattn.kernels.page_formats import KV_DTYPES, page_bytes
from hf_fastattn.pages.model_layout import is_pageable, key_shape, layer_window, template_layers
from hf_fastattn.pages.page_group import Holder, Holding, PageGroup
from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.page_storage import PageStorage
from hf_fastattn.pages.turn import Turn

if TYPE_CHECKING:
    from hf_fastattn.kernels.attention.workspace import Workspace


class PageGroups:
    """The page groups of a model.

    One thread at a time may change pages and the tables of the caches that hold them: the one whose `turn` it is.

    Args:
        config: the model's configuration; tells layers, windows and the size of a token.
        fastattn: page size and memory limit.
        dtype: dtype that keys will have, for the memory limit; the configuration's by default.
        turn: of whatever else goes with these pages; one of their own by default.
        ranks: processes that the key heads are spread over, for the memory limit.
        alike: see `PageGroup.grow_storage`; of several processes.
    """

    def __init__(
        self,
        config: Any,
        fastattn: FastAttnConfig,
        dtype: torch.dtype | None = None,
        turn: Turn | None = None,
        ranks: int = 1,
        alike: Callable[[bool], bool] | None = None,
    ) -> None:
        text = config.get_text_config(decoder=True)
        self.page_size = fastattn.page_size
        self.backend, self.batch_invariant = fastattn.backend, fastattn.batch_invariant
        self.streaming = fastattn.streaming
        self.stream = None if fastattn.streaming is None else fastattn.streaming.layout(fastattn.page_size)
        self.workspaces: dict[tuple[torch.device, int], Workspace] = {}
        self.turn = turn or Turn()
        self._holders: set[Holder] = set()
        # Holders whose caches were garbage-collected. That happens inside any statement of any thread, so the callback only
        # appends here; `settle()` releases their pages.
        self._ended: deque[Any] = deque()
        self._config, self._fastattn, self._dtype, self._ranks = config, fastattn, dtype, ranks
        self.alike = alike
        windows = [layer_window(layer) for layer in template_layers(config) if is_pageable(layer)]
        heads, head_dim = key_shape(config)
        self.head_dim = head_dim
        dtype = dtype or getattr(text, "dtype", None) or torch.float32
        itemsize = torch.empty((), dtype=dtype, device="meta").element_size()
        # With fewer heads than ranks each holds one.
        heads = max(heads // ranks, 1)
        numbers = self.page_size * heads * head_dim
        stored = [KV_DTYPES.get(fastattn.kv_dtype_of(window) or "") for window in windows]
        self.page_bytes = sum(
            2 * numbers * itemsize if dtype is None else page_bytes(self.page_size, heads, head_dim) for dtype in stored
        )
        self._largest: dict[int | None, int] = {}
        self._groups = {
            window: PageGroup(window, PagePool(0, self._max_pages()), PageStorage(self.page_size, dtype, fastattn.backend))
            for window, dtype in dict(zip(windows, stored, strict=True)).items()
        }

    def _max_pages(self) -> int | None:
        limit = self._fastattn.memory_limit
        # Every group may hold the same number of tokens.
        return None if limit is None else limit // max(self.page_bytes, 1)

    def group(self, window: int | None) -> PageGroup:
        """The group of layers with this window.

        Raises:
            ValueError: the model these pages were made for has no such layers.
        """
        if window not in self._groups:
            raise ValueError(f"no layer with window {window} belongs to these pages; known: {list(self._groups)}")
        return self._groups[window]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._groups.values())

    @property
    def storage_version(self) -> int:
        """Another number whenever a tensor behind the pages was made, moved or dropped."""
        return sum(group.storage.version for group in self)

    def is_growing(self, windows: Iterable[int | None]) -> bool:
        """Whether pages of these windows have been counted that the tensors do not hold yet, or there are no tensors."""
        groups = map(self.group, windows)
        return any(group.storage.capacity < max(group.pool.capacity, 1) for group in groups)

    # ---- who holds pages --------------------------------------------------------------------------------------

    def enlist(self, cache: Any, tables: Mapping[int | None, Holding]) -> Holder:
        """From now on pages in the tables of `cache` count as held, until it is gone."""
        # The callback runs no Python code, so that no signal can come inside of it.
        holder = Holder(cache, self._ended.append)
        holder.tables = tables
        self._holders.add(holder)
        return holder

    def discharge(self, holder: Holder) -> None:
        """Its cache holds no pages of these groups any more; they are released at the next `settle()`."""
        self._ended.append(holder)

    def settle(self) -> None:
        """Release what caches held that are gone; after an exception amid a change, count the owners of pages anew.

        Called by the thread whose turn it is.
        """
        for group in self._groups.values():
            if group.pool.unsettled:
                self._recount()
        while self._ended:
            # Forgotten last, so that it is done again if an exception comes.
            ended = self._ended[0]
            for table in ended.tables.values():
                table.clear()
            self._holders.discard(ended)
            self._ended.popleft()

    def _recount(self) -> None:
        tables: dict[int | None, list[Holding]] = {window: [] for window in self._groups}
        for holder in list(self._holders):
            cache = holder()
            if cache is not None and cache.groups is self:
                # The cache may have exchanged its tables just before the exception.
                holder.tables = cache.tables
            for window, table in holder.tables.items():
                table.forget_derived()
                tables[window].append(table)
        for window, group in self._groups.items():
            group.pool.recount(pages for table in tables[window] for pages in table.rows)

    def reclaim(self) -> bool:
        """Let go of all pages that are held for prompts to come only; whether there were any."""
        held = sum(group.pool.in_use for group in self)
        for group in self:
            if group.pool.reclaim is not None:
                group.pool.reclaim(group.pool.in_use)
        return sum(group.pool.in_use for group in self) < held

    @property
    def pages_in_use(self) -> int:
        """Pages held by caches, over all groups."""
        return (self.turn.take(0), self._count())[1]

    def _count(self) -> int:
        if self.turn.is_mine():
            self.settle()
        return sum(group.pool.in_use for group in self)

    def emptied(self) -> PageGroups:
        """Other groups of the same kind, without pages."""
        return PageGroups(self._config, self._fastattn, self._dtype, ranks=self._ranks, alike=self.alike)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for pages."""
        return sum(group.storage.nbytes for group in self)

    @property
    def bytes_saved(self) -> int:
        """Bytes that pages would take besides if no keys and values were stored in 8 bits."""
        return sum(group.storage.saved for group in self)

    @property
    def formats(self) -> dict[str, list[int | None]]:
        """The windows of the layers that each 8-bit dtype stores, by its name in `FastAttnConfig.kv_dtype`."""
        named = {dtype: name for name, dtype in KV_DTYPES.items()}
        found: dict[str, list[int | None]] = {}
        for group in self:
            if group.storage.eight_bits is not None:
                found.setdefault(named[group.storage.eight_bits], []).append(group.window)
        return found

    def describe_limit(self) -> str:
        """The memory limit in words, for an error."""
        limit, most = self._fastattn.memory_limit, self._max_pages()
        if limit is None or most is None:
            return "no memory_limit is set"
        return (
            f"memory_limit={limit} bytes holds {most} pages of {self.page_size} tokens "
            f"({self.page_bytes} bytes a page over all layers), that is {most * self.page_size} tokens"
        )

    def describe_full(self, targets: list[int]) -> str:
        """That rows of `targets[b]` tokens do not fit, in words, for an error."""
        asked = sum(-(-target // self.page_size) for target in targets)
        return (
            f"the cache is full: rows of {max(targets)} tokens need {asked} pages, and {self.pages_in_use} are in use; "
            f"{self.describe_limit()}. Use fewer or shorter rows, or a higher FastAttnConfig(memory_limit=...)"
        )

    def shrink(self, keep: float) -> None:
        """Give memory back: if no page is held, keep at most the share `keep` of the storage."""
        for group in self:
            # Pages that the allocation failed for would be asked for again.
            group.pool.shrink(group.storage.capacity)
            if group.pool.in_use or keep >= 1:
                continue
            # The share is of the largest capacity so far, so that a small call does not shrink it.
            self._largest[group.window] = max(self._largest.get(group.window, 0), group.pool.capacity)
            kept = int(self._largest[group.window] * keep)
            group.pool.shrink(kept)
            group.storage.shrink(kept)
