"""`own_pages`: pages of a cache copied into groups of their own, for a thread that may not touch the common ones."""

from __future__ import annotations

from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.page_table import PageTable


def own_pages(groups: PageGroups, tables: dict[int | None, PageTable]) -> tuple[PageGroups, dict[int | None, PageTable]]:
    """Groups without a page but copies of those in `tables`, and the same tables over them.

    Nothing of `groups` is changed, so another thread may go on with it meanwhile: it copies what it shares with these
    tables before it writes.
    """
    own, copies = groups.emptied(), {}
    for window, table in tables.items():
        source, target = groups.group(window), own.group(window)
        held = sorted({page for pages in table.rows for page in pages if page >= 0})
        places = dict(zip(held, target.pool.allocate(len(held)), strict=True))
        copies[window] = table.moved(target.pool, places)
        target.storage.fill_from(source.storage, places, target.pool.capacity)
    return own, copies
