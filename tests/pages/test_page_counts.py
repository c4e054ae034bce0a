"""How often rows of a page table hold a page: as counted one by one, whatever they have in common."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain

import pytest

from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.shared_runs import page_counts


def rows_that_branch(rng: random.Random) -> list[list[int]]:
    """Rows that begin with pages of a row before, or with released ones, and go on with their own."""
    rows: list[list[int]] = []
    fresh = iter(range(10_000))
    for _ in range(rng.randrange(12)):
        begin = list(rng.choice(rows))[: rng.randrange(9)] if rows and rng.random() < 0.8 else [-1] * rng.randrange(3)
        rows.append(begin + [next(fresh) for _ in range(rng.randrange(5))])
    return rows


@pytest.mark.parametrize("seed", range(300))
def test_as_counted_one_by_one(seed: int) -> None:
    rows = rows_that_branch(random.Random(seed))
    expected = Counter(chain.from_iterable(rows))
    del expected[-1]
    assert page_counts(rows) == expected


def test_nothing_is_released_more_often_than_it_is_held() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.fork_often({pages[0]: 2})
    pool.release_often({pages[0]: 3, pages[1]: 1})
    assert pool.in_use == 0
    with pytest.raises(ValueError, match="released 1 times"):
        pool.release_often({pages[0]: 1})
