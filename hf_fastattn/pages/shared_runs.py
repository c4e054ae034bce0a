"""What neighbouring rows of a page table have in common: which of them to read together, and how often a page is there."""

from __future__ import annotations

from collections.abc import Sequence

# Levels of prefixes within prefixes that are looked at.
MOST_LEVELS = 64


def shared_runs(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each row the first row of its run, and how many first pages all rows of the run have in common.

    Of prefixes within prefixes one level is taken: that which saves the most reads of pages.
    """
    edges = [common_pages(before, row) for before, row in zip(rows, rows[1:], strict=False)]
    found = [(row, 0) for row in range(len(rows))]
    for first, past, columns in _best(edges, 0, len(rows), 0)[1]:
        found[first:past] = [(first, columns)] * (past - first)
    return found


def common_pages(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first pages are the same, released ones apart."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low if not low or one[0] >= 0 else 0


def page_counts(rows: Sequence[Sequence[int]]) -> dict[int, int]:
    """How many entries of the rows each page is; what neighbours begin with is looked at once."""
    counts: dict[int, int] = {}
    # Stretches of the row before: the column that each begins at, and the row since which it has stood there.
    stretches: list[tuple[int, int]] = []
    before: Sequence[int] = []
    for number, row in enumerate([*rows, []]):
        same, past = common_pages(before, row), len(before)
        while stretches and past > same:
            column, since = stretches.pop()
            first = max(column, same)
            for page in before[first:past]:
                counts[page] = counts.get(page, 0) + number - since
            if column < same:
                stretches.append((column, since))
            past = first
        if same < len(row):
            stretches.append((same, number))
        before = row
    counts.pop(-1, None)
    return counts


def _best(edges: Sequence[int], first: int, past: int, level: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Reads saved, and runs `(first row, row past the last, pages)`, of the rows from `first` on."""
    if past - first < 2:
        return 0, []
    columns = min(edges[first : past - 1])
    whole = (past - first - 1) * columns
    if level == MOST_LEVELS:
        return whole, [(first, past, columns)] if columns else []
    cuts = [row + 1 for row in range(first, past - 1) if edges[row] == columns]
    parts = [_best(edges, *ends, level + 1) for ends in zip([first, *cuts], [*cuts, past], strict=True)]
    saved = sum(part[0] for part in parts)
    if whole >= saved:
        return whole, [(first, past, columns)] if columns else []
    return saved, [run for part in parts for run in part[1]]
