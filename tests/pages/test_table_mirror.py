"""The array of a page table: the pages of all rows, whatever these have in common and however they change."""

from __future__ import annotations

import random

import pytest

from hf_fastattn.pages.table_mirror import TableMirror
from tests.pages.test_page_counts import rows_that_branch


@pytest.mark.parametrize("seed", range(200))
def test_every_entry_is_the_rows(seed: int) -> None:
    rng = random.Random(seed)
    rows = rows_that_branch(rng)
    mirror = TableMirror()
    mirror.add_rows(len(rows))
    for _ in range(4):
        array = mirror.update(rows)
        for row, pages in enumerate(rows):
            assert all(held in (page, -1) for held, page in zip(pages, array[row].tolist(), strict=False))
        for row in range(len(rows)):
            if rng.random() < 0.5:
                column = rng.randrange(len(rows[row]) + 1)
                other = rng.choice(rows)
                rows[row] = rows[row][:column] + (other[column:] or [rng.randrange(10_000)])
                mirror.changed(row, column)


def test_the_version_tells_contents_apart() -> None:
    mirror = TableMirror()
    mirror.add_rows(2)
    rows = [[3, 4], [3, 4]]
    mirror.update(rows)
    first = mirror.version
    mirror.update(rows)
    assert mirror.version == first
    rows[1] = [3, 5]
    mirror.changed(1, 1)
    assert mirror.update(rows)[1, :2].tolist() == [3, 5] and mirror.version != first
