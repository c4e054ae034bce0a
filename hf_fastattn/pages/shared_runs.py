"""What neighbouring rows of a page table have in common: which of them to read together, and how often a page is there."""

from __future__ import annotations

from collections.abc import Sequence

# Levels of prefixes within prefixes that are looked at; where several of them are to be taken, fewer.
MOST_LEVELS, MOST_NESTED = 64, 12
# First row, row past the last, and how many first pages all rows of the run have in common.
Run = tuple[int, int, int]


def shared_runs(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each row the first row of its run, and how many first pages all rows of the run have in common.

    Of prefixes within prefixes one level is taken: that which saves the most reads of pages.
    """
    edges = [common_pages(before, row) for before, row in zip(rows, rows[1:], strict=False)]
    found = [(row, 0) for row in range(len(rows))]
    for first, past, columns in _best(edges, 0, len(rows), 0)[1]:
        found[first:past] = [(first, columns)] * (past - first)
    return found


def nested_runs(rows: Sequence[Sequence[int]], levels: int) -> list[list[Run]]:
    """Runs within runs, the level of the outermost first: those of at most `levels` that save the most reads of pages.

    Each page of a run is read once for all its rows, those that an outer run reads already apart.
    """
    edges = [common_pages(before, row) for before, row in zip(rows, rows[1:], strict=False)]
    found: list[list[Run]] = [[] for _ in range(levels)]
    for level, run in _Nested(edges).best(0, len(rows), 0, levels, 0)[1]:
        found[level].append(run)
    return [sorted(runs) for runs in found if runs]


def saved_reads(levels: Sequence[Sequence[Run]]) -> int:
    """Reads of pages, or of tokens if runs count these, that runs within runs save."""
    saved = 0
    for number, runs in enumerate(levels):
        above = levels[number - 1] if number else ()
        for first, past, length in runs:
            outer = next((other for start, end, other in above if start <= first < end), 0)
            saved += (past - first - 1) * (length - outer)
    return saved


class _Nested:
    """Which runs of a tree of prefixes to take.

    Args:
        edges: pages that each row has in common with the next.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self._edges = edges
        self._known: dict[tuple[int, int, int, int], tuple[int, list[tuple[int, Run]]]] = {}

    def best(self, first: int, past: int, outer: int, levels: int, depth: int) -> tuple[int, list[tuple[int, Run]]]:
        """Reads saved, and runs with their level counted from that of this call, of the rows from `first` on.

        Args:
            outer: pages that a run around these rows reads.
            depth: branches of the tree above this one.
        """
        key = (first, past, outer, levels)
        if key not in self._known:
            self._known[key] = self._best(*key, depth) if past - first > 1 and levels else (0, [])
        return self._known[key]

    def _best(self, first: int, past: int, outer: int, levels: int, depth: int) -> tuple[int, list[tuple[int, Run]]]:
        columns = min(self._edges[first : past - 1])
        saved, runs = (past - first - 1) * (columns - outer), [(0, (first, past, columns))]
        if columns <= outer:
            saved, runs = 0, []
        if depth == MOST_NESTED:
            return saved, runs
        cuts = [row + 1 for row in range(first, past - 1) if self._edges[row] == columns]
        parts = [part for part in zip([first, *cuts], [*cuts, past], strict=True) if part[1] - part[0] > 1]
        without = [self.best(*part, outer, levels, depth + 1) for part in parts]
        if runs:
            inside = [self.best(*part, columns, levels - 1, depth + 1) for part in parts]
            saved += sum(part[0] for part in inside)
            runs += [(level + 1, run) for part in inside for level, run in part[1]]
        if not runs or sum(part[0] for part in without) > saved:
            return sum(part[0] for part in without), [run for part in without for run in part[1]]
        return saved, runs


def common_pages(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first pages are the same, released ones apart."""
    low, high = 0, min(len(one), len(other))
    # Most rows have nothing in common, or are samples of one prompt, or end in pages of their own.
    if not high or one[0] != other[0]:
        return 0
    same, step = high, 1
    while same and one[same - 1] != other[same - 1]:
        same, step = max(same - step, 0), 2 * step
    if one[:same] == other[:same]:
        low = same
        while low < high and one[low] == other[low]:
            low += 1
        high = low
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
