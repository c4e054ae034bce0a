"""`PrefixGroups`: neighbouring rows of a decode loop with the same first pages, and whether reading these once pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.pages.page_table import PageTable
from hf_fastattn.pages.shared_runs import Run, nested_runs, saved_reads

# Bytes of K/V of one layer that sharing has to save. On an H200 the shared-prefix kernel has 8 us more overhead than plain
# decode; reading this many bytes takes 14 us from memory, less from the L2 cache.
WORTH_BYTES = 64 << 20
# The same of each further level of prefixes within prefixes: it adds states to merge, and no launch.
WORTH_LEVEL = 16 << 20
# Levels that the kernel takes.
MOST_LEVELS = 3
# Above this group size the kernel's tiles are the same.
MOST_SHARERS = 64
# Prefix groups are padded to at least this many, so that the kernel is not recompiled for every number.
MIN_GROUPS = 16


@dataclass(frozen=True)
class PrefixGroups:
    """Groups of neighbouring rows, on the host.

    Attributes:
        groups: `(first row, row past the last, tokens)`: two rows or more, in order, and the tokens whose pages they share.
        token_bytes: of a token's keys and values in one layer.
        inner: levels of groups within these, and so on; their tokens include those of the groups around them.
    """

    groups: tuple[Run, ...] = ()
    token_bytes: int = 0
    inner: tuple[tuple[Run, ...], ...] = ()

    @property
    def levels(self) -> tuple[tuple[Run, ...], ...]:
        """The groups of all levels, the outermost first."""
        return (self.groups, *self.inner)

    @staticmethod
    def of(table: PageTable | None, keys: Tensor | None, lengths: Sequence[int]) -> PrefixGroups:
        """The groups of a cache none of whose rows was released; none if no layer sees all keys.

        Args:
            table: the rows' page table of the layers without a window.
            keys: key pages `[N, P, G, D]` of one such layer.
            lengths: tokens of each row.
        """
        if table is None or keys is None:
            return PrefixGroups()
        size = table.page_size
        groups = tuple((first, past, columns * size) for first, past, columns in table.prefixes(lengths))
        found = PrefixGroups(groups, 2 * keys[0, 0].nbytes)
        # Only full pages stay shared, since a writer copies its partial page.
        whole = [row[: length // size] for row, length in zip(table.rows, lengths, strict=True)] if groups else []
        for count in range(2, MOST_LEVELS + 1 if groups else 2):
            nested = nested_runs(whole, count)
            levels = [tuple((first, past, columns * size) for first, past, columns in runs) for runs in nested]
            more = saved_reads(levels) - saved_reads(found.levels)
            if len(levels) < count or more * found.token_bytes < WORTH_LEVEL:
                break
            found = PrefixGroups(levels[0], found.token_bytes, tuple(levels[1:]))
        return found

    def keep(self, kept: Sequence[int]) -> PrefixGroups:
        """The groups that are left where row b is what row `kept[b]` was; `kept` ascends.

        Rows of a group stay neighbours when others of it leave.
        """
        levels = [_kept(groups, kept) for groups in self.levels]
        # A level within an empty one is empty.
        return PrefixGroups(levels[0], self.token_bytes, tuple(groups for groups in levels[1:] if groups))

    def worthwhile(self) -> PrefixGroups:
        """These groups if it pays to read their prefixes once, otherwise none."""
        return self if saved_reads(self.levels) * self.token_bytes >= WORTH_BYTES else PrefixGroups()

    @property
    def sharers(self) -> int:
        """About how many rows the largest group has: a power of two, 0 without a group."""
        largest = max((past - first for first, past, _ in self.groups), default=0)
        return min(power_of_2(largest), MOST_SHARERS) if largest else 0

    @property
    def group_count(self) -> int:
        """Entries of `layout()` that there has to be room for: a power of two, 0 without a group."""
        return max(power_of_2(max(len(lengths) for _, lengths in self.layout())), MIN_GROUPS) if self.groups else 0

    def layout(self) -> list[tuple[list[int], list[int]]]:
        """`group_starts` and `prefix_lens` of each level, rows between groups in groups that share nothing."""
        return [_layout(groups) for groups in self.levels]


def _kept(groups: Sequence[Run], kept: Sequence[int]) -> tuple[Run, ...]:
    found, place = [], 0
    for first, past, tokens in groups:
        while place < len(kept) and kept[place] < first:
            place += 1
        start = place
        while place < len(kept) and kept[place] < past:
            place += 1
        if place - start > 1:
            found.append((start, place, tokens))
    return tuple(found)


def _layout(groups: Sequence[Run]) -> tuple[list[int], list[int]]:
    starts, lengths = [0], []
    for first, past, tokens in groups:
        if first > starts[-1]:
            starts.append(first)
            lengths.append(0)
        starts.append(past)
        lengths.append(tokens)
    return starts, lengths


def sharing_order(table: PageTable) -> list[int] | None:
    """An order of the rows in which neighbours share more of their pages; None if the one they have is as good."""
    rows = table.rows
    order = sorted(range(len(rows)), key=rows.__getitem__)
    if order == list(range(len(rows))) or _saved([rows[row] for row in order]) <= _saved(rows):
        return None
    return order


def _saved(rows: Sequence[list[int]]) -> int:
    """Reads of pages that runs of neighbouring rows save."""
    return saved_reads(nested_runs(rows, MOST_LEVELS))
