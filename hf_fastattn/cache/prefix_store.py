"""`PrefixStore`: the pages of a model that stay for prompts to come, by the state of the model that they were made in."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from hf_fastattn.cache.embedded_rows import EmbeddedRows, KnownRows
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.page_pool import Spare
from hf_fastattn.pages.prefix_index import PrefixIndex

# States of a model (weights, adapters) whose pages may be there side by side.
MOST_STATES = 8
# Share of the device's memory that the pages may take where no limit is set.
SHARE = 4
# Pages that stay grow call by call: each time they move, all are copied and steps are recorded anew, which takes as long as
# tens of steps, so they grow by this share, or by so many tokens, up to the share of the memory that they may take.
SPARE, SPARE_TOKENS = 0.5, 1024


class PrefixStore:
    """An index of pages, which holds them as a cache does.

    Args:
        groups: the model's pages; only layers that see all keys have an index.
        stays: for calls to come, not for one prompt alone.
        limited: a memory limit says how many pages there may be.
    """

    def __init__(self, groups: PageGroups, stays: bool = False, limited: bool = True) -> None:
        self.groups, self._limited = groups, limited
        group = groups.group(None)
        self.index = PrefixIndex(group.pool, groups.page_size)
        self.tables: dict[int | None, PrefixIndex] = {None: self.index}
        self._states: list[tuple[int, Any, KnownRows]] = []
        self._named = 0
        groups.enlist(self, self.tables)
        self._before = group.pool.reclaim, group.pool.spare
        spare = Spare(SPARE, SPARE_TOKENS // groups.page_size) if stays else Spare()
        group.pool.reclaim, group.pool.spare = self.index.evict, spare

    @property
    def named(self) -> int:
        """How many states of the model have been met."""
        return self._named

    def root_of(self, state: Any, rows: EmbeddedRows | None = None) -> int:
        """The beginning, for `index`, of pages that were made in a state of the model equal to this one.

        Args:
            rows: of the embeddings, those of all tokens that pages are asked for or will be made of, where the state says
                nothing of embeddings.
        """
        for place, entry in enumerate(self._states):
            if entry[1] == state and entry[2].take(rows):
                self._states.append(self._states.pop(place))
                return entry[0]
        self._named += 1
        known = KnownRows()
        known.take(rows)
        # What an older state has left is not found any more, and evicted in its turn.
        self._states = [*self._states[1 - MOST_STATES :], (-self._named, state, known)]
        return -self._named

    def takes(self, root: int, rows: EmbeddedRows | None) -> bool:
        """Whether pages of more tokens, computed with these rows, may be found from a beginning."""
        return any(entry[0] == root and entry[2].take(rows) for entry in self._states)

    def close(self) -> None:
        """Hold nothing from now on."""
        pool = self.groups.group(None).pool
        pool.reclaim, pool.spare = self._before
        self.index.clear()
        self._states.clear()

    def trim(self) -> None:
        """After a call: where no limit is set, hold no more than a share of the device's memory."""
        self.index.touch_inserted()
        if not self._limited:
            group = self.groups.group(None)
            keys = group.storage.any_pages()
            if keys is not None:
                most = _memory_of(keys.device) // SHARE // max(self.groups.page_bytes, 1)
                group.pool.spare = replace(group.pool.spare, most=most)
                self.index.trim(most)


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
