"""`forward_batch`: what a forward over a paged cache writes and reads, by attention window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.batch_tensors import HostBatch
from hf_fastattn.cache.by_window import ByWindow
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.page_table import PageTable

# New tokens a row from which numpy takes the host less time than Python.
WORTH_NUMPY = 16


def forward_batch(
    groups: PageGroups, tables: Mapping[int | None, PageTable], lengths: list[int], counts: list[int], targets: list[int]
) -> Batch:
    """The batch of a forward that has its pages.

    Args:
        tables: page tables of the cache, by window.
        lengths: tokens a row before the forward.
        counts: new tokens a row.
        targets: tokens a row after it.
    """
    size = groups.page_size

    # Made when asked for: a forward whose inputs are static tensors needs neither.
    def plan(window: int | None) -> ReadPlan:
        table = tables[window]
        return ReadPlan(table.rows, counts, targets, size, window, table.prefixes(lengths))

    def slots(window: int | None) -> NDArray[np.int64]:
        rows = list(zip(tables[window].rows, lengths, targets, strict=True))
        if max(counts, default=0) < WORTH_NUMPY:
            few = [pages[token // size] * size + token % size for pages, first, last in rows for token in range(first, last)]
            return np.array(few, np.int64)
        found = []
        for pages, first, last in rows:
            token = np.arange(first, last)
            found.append(np.array(pages, np.int64)[token // size] * size + token % size)
        return np.concatenate(found)

    def pages(window: int | None) -> NDArray[np.int32]:
        table = tables[window]
        columns = max(map(len, table.rows), default=0)
        return table.as_array()[0][:, :columns]

    host = HostBatch(counts, targets, ByWindow(tables, plan), ByWindow(tables, slots), ByWindow(tables, pages))
    return Batch.from_host(host, BatchOptions(groups.backend, groups.batch_invariant, groups.workspaces))
