"""`forward_batch`: what a forward over a paged cache writes and reads, by attention window."""

from __future__ import annotations

from collections.abc import Mapping

from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.batch_tensors import HostBatch
from hf_fastattn.cache.by_window import ByWindow
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.page_table import PageTable


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

    def slots(window: int | None) -> list[int]:
        return [
            pages[token // size] * size + token % size
            for pages, first, last in zip(tables[window].rows, lengths, targets, strict=True)
            for token in range(first, last)
        ]

    host = HostBatch(counts, targets, ByWindow(tables, plan), ByWindow(tables, slots))
    return Batch.from_host(host, BatchOptions(groups.backend, groups.batch_invariant, groups.workspaces))
