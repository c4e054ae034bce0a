"""Which rows of a page table to read together, of prefixes within prefixes too."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest

from hf_fastattn.pages import shared_runs
from hf_fastattn.pages.shared_runs import Run, common_pages, nested_runs, saved_reads

Rows = Sequence[Sequence[int]]


def tree(random_: random.Random, rows: int, pages: tuple[int, ...] = ()) -> list[list[int]]:
    """Rows that branch off now and then, each page with a number of its own."""
    own = (*pages, *(random_.randrange(10**9) for _ in range(random_.randint(0, 3))))
    if rows == 1 or random_.random() < 0.1:
        return [[*own, random_.randrange(10**9)] for _ in range(rows)]
    cut = random_.randint(1, rows - 1)
    return [*tree(random_, cut, own), *tree(random_, rows - cut, own)]


def most_saved(rows: Rows, levels: int) -> int:
    """By trial of every run, as long as it can be, as the first of those from row `first` to before `past`."""
    edges = [common_pages(*pair) for pair in zip(rows, rows[1:], strict=False)]

    @functools.cache
    def most(first: int, past: int, outer: int, left: int) -> int:
        if past - first < 2 or not left:
            return 0
        found = most(first + 1, past, outer, left)
        for end in range(first + 2, past + 1):
            columns = min(edges[first : end - 1])
            if max([*edges[max(first - 1, 0) : first], *edges[end - 1 : end]], default=-1) >= columns:
                continue
            saved = (end - first - 1) * max(columns - outer, 0) + most(first, end, max(columns, outer), left - 1)
            found = max(found, saved + most(end, past, outer, left))
        return found

    return most(0, len(rows), 0, levels)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_most_is_saved(levels: int) -> None:
    for seed in range(60):
        random_ = random.Random(seed)
        rows = tree(random_, random_.randint(1, 9))
        found = nested_runs(rows, levels)
        assert saved_reads(found) == most_saved(rows, levels)
        assert_sound(rows, found)


def assert_sound(rows: Rows, found: list[list[Run]]) -> None:
    """Runs of a level are apart and in order, lie within one of the level above, and hold pages that all rows have."""
    above: list[Run] = [(0, len(rows), 0)]
    for runs in found:
        assert runs and all(one[1] <= other[0] for one, other in zip(runs, runs[1:], strict=False))
        for first, past, columns in runs:
            assert past - first > 1 and len({tuple(rows[row][:columns]) for row in range(first, past)}) == 1
            outer = [run for run in above if run[0] <= first and past <= run[1]]
            assert len(outer) == 1 and outer[0][2] < columns <= min(map(len, rows[first:past]))
        above = runs


def test_a_system_prompt_questions_and_samples() -> None:
    rows = [
        [0, 1, 2, 10 + question, 20 + question, 100 + 10 * question + sample] for question in range(3) for sample in range(4)
    ]
    assert nested_runs(rows, 2) == [[(0, 12, 3)], [(0, 4, 5), (4, 8, 5), (8, 12, 5)]]
    assert nested_runs(rows, 3) == nested_runs(rows, 2)
    assert nested_runs(rows, 1) == [[(0, 4, 5), (4, 8, 5), (8, 12, 5)]] and nested_runs([[1], [2]], 2) == []


def test_a_chain_of_prefixes_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of one chat as rows: each shares one page more with the next than with the one before."""
    rows = [[*range(turn), 10_000 + turn] for turn in range(200)]
    calls: list[int] = []
    best = shared_runs._Nested._best
    monkeypatch.setattr(shared_runs._Nested, "_best", lambda *args: calls.append(1) or best(*args))
    found = nested_runs(rows, 3)
    assert len(found) == 3 and len(calls) < 2000
    assert_sound(rows, found)


def test_pages_in_common_end_where_two_rows_first_differ() -> None:
    """Also where the same page follows different ones."""
    draw = random.Random(3)
    for _ in range(5000):
        one = [draw.randrange(3) for _ in range(draw.randrange(12))]
        other = one[: draw.randrange(len(one) + 1)] + [draw.randrange(3) for _ in range(draw.randrange(8))]
        same = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        assert common_pages(one, other) == (min(len(one), len(other)) if same is None else same)
