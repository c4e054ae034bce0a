"""The index of pages under random programs: rows that fork, grow, shrink and end, pages that stay and are let go."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hf_fastattn.counters import CallCounters
from hf_fastattn.pages.page_pool import CacheFullError, PagePool
from hf_fastattn.pages.page_table import PageTable
from hf_fastattn.pages.prefix_index import PrefixIndex, RowTokens, rows_of_tokens
from hf_fastattn.pages.shared_runs import common_pages, shared_runs
from tests.bad_input.interrupting import interrupted

SIZE = 4
PROGRAMS = int(os.environ.get("FASTATTN_PROGRAMS", "1000"))


def row_of(tokens: list[int]) -> RowTokens:
    return RowTokens(np.array(tokens, np.int64), SIZE)


class RandomPrefixes(RuleBasedStateMachine):
    """Tables and an index of one pool; what a page holds is written down, with the state of the model and all before it.

    What all programs together came upon is counted in `met`.
    """

    met: Counter[str] = Counter()

    @initialize(limit=st.one_of(st.none(), st.integers(4, 16)))
    def start(self, limit):
        self.pool = PagePool(0, limit)
        self.index = PrefixIndex(self.pool, SIZE)
        self.pool.reclaim = self.index.evict
        self.counters = CallCounters()
        self.tables: list[PageTable] = []
        self.rows: list[list[int]] = []
        self.states: list[int] = []
        # Rows of which pages may be in the index.
        self.kept: list[tuple[int, list[int]]] = []
        # By page and place the state, and the tokens up to there: what a key depends on.
        self.memory: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}

    def copy_pages(self, moves):
        for source, target in moves:
            assert self.pool.owners(source), "a freed page would be copied"
            for place in range(SIZE):
                if (source, place) in self.memory:
                    self.memory[target, place] = self.memory[source, place]

    def grow(self, which, target):
        """Write the tokens of a row up to `target`."""
        table, row, state = self.tables[which], self.rows[which], self.states[which]
        have = self.held[which]
        table.reserve([have], [target], 0, self.counters, self.copy_pages)
        for place in range(have, target):
            page = table.rows[0][place // SIZE]
            assert self.pool.owners(page) == 1, "a shared page would be written"
            self.memory[page, place % SIZE] = (state, tuple(row[: place + 1]))
        self.held[which] = target

    @precondition(lambda self: len(self.tables) < 4)
    @rule(data=st.data(), state=st.integers(-2, -1))
    def prompt(self, data, state):
        """A prompt, of few different tokens, begins on pages that are found, and goes on; mostly as a row before it did."""
        row: list[int] = []
        if self.kept and data.draw(st.integers(0, 3)):
            state, before = data.draw(st.sampled_from(self.kept[-4:]))
            row = before[: len(before) - data.draw(st.integers(0, len(before)))]
        count = data.draw(st.integers(1, 16 if row else 22))
        drawn = data.draw(st.integers(0, 2**count - 1))
        row = row + [drawn >> place & 1 for place in range(count)]
        table = PageTable(self.pool, SIZE)
        pages, tokens = self.index.match(state, row_of(row))
        for other, own in zip(self.rows, self.states, strict=True):
            if own == state:
                # What a match of another row tells of this one changes nothing.
                whole, held = self.index.match(state, row_of(other))
                near = whole[: held // SIZE], row_of(row).common(row_of(other)) // SIZE
                assert self.index.match(state, row_of(row), near)[1] == tokens
        assert tokens < len(row)
        assert not tokens or tokens >= SIZE
        self.met["whole" if tokens and not tokens % SIZE else "partial" if tokens else "none"] += 1
        for place in range(tokens):
            assert self.memory[pages[place // SIZE], place % SIZE] == (state, tuple(row[: place + 1])), "stale"
        self.index.touch([pages])
        table.hold([pages])
        self.tables.append(table)
        self.rows.append(row)
        self.states.append(state)
        self.held = [*getattr(self, "held", []), tokens]
        copied = self.counters.pages_copied
        try:
            self.grow(len(self.tables) - 1, len(row))
            self.met["copied"] += self.counters.pages_copied > copied
        except CacheFullError:
            self.met["partial, full" if tokens % SIZE else "full"] += 1
            self.settle()
            self.forget(len(self.tables) - 1)

    def settle(self):
        """What a cache does after an exception."""
        self.pool.recount(pages for held in [*self.tables, self.index] for pages in held.rows)

    def forget(self, which):
        for values in (self.rows, self.states, self.held):
            values.pop(which)
        self.tables.pop(which).clear()

    @precondition(lambda self: len(self.tables) < 4)
    @rule(data=st.data(), state=st.integers(-2, -1))
    def call(self, data, state):
        """A prompt, some tokens after it, and all of it stays."""
        count = len(self.tables)
        self.prompt(data, state)
        if len(self.tables) > count:
            self.decode(data, count)
            self.keep(data, count, True)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def keep(self, data, which=None, ends=None):
        which = data.draw(st.integers(0, len(self.tables) - 1)) if which is None else which
        count = self.held[which] if ends else data.draw(st.integers(0, self.held[which]))
        row, table, state = self.rows[which], self.tables[which], self.states[which]
        ends = data.draw(st.booleans()) if ends is None else ends
        path = self.index.insert(state, row_of(row[:count]), table.rows[0], count, partial=ends)
        self.kept.append((state, row[:count]))
        self.met["partial kept"] += len(path) * SIZE > count
        if ends:
            self.forget(which)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def decode(self, data, which=None):
        which = data.draw(st.integers(0, len(self.tables) - 1)) if which is None else which
        self.rows[which].extend(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=6)))
        try:
            self.grow(which, len(self.rows[which]))
        except CacheFullError:
            self.settle()
            del self.rows[which][self.held[which] :]
            self.tables[which].trim([self.held[which]])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def crop(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        self.held[which] -= data.draw(st.integers(0, min(self.held[which] - 1, 6)))
        del self.rows[which][self.held[which] :]
        self.tables[which].trim([self.held[which]])

    @precondition(lambda self: self.tables and len(self.tables) < 4)
    @rule(data=st.data())
    def fork(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables.append(self.tables[which].selected([0], self.counters))
        self.rows.append(list(self.rows[which]))
        self.states.append(self.states[which])
        self.held.append(self.held[which])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data):
        self.forget(data.draw(st.integers(0, len(self.tables) - 1)))

    @precondition(lambda self: hasattr(self, "pool"))
    @rule(count=st.integers(0, 8))
    def evict(self, count):
        free, held = self.pool.free, len(self.index)
        self.index.evict(count)
        assert self.pool.free >= min(free + count, self.pool.capacity) or not len(self.index)
        assert len(self.index) <= held

    @precondition(lambda self: hasattr(self, "pool"))
    @rule(most=st.integers(0, 12))
    def trim(self, most):
        self.index.trim(most)
        assert len(self.index) <= most

    @precondition(lambda self: hasattr(self, "pool"))
    @rule()
    def release(self):
        self.index.clear()
        assert not len(self.index)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), moment=st.integers(0, 500), change=st.sampled_from(["insert", "evict", "clear", "match", "hold"]))
    def interrupt(self, data, moment, change):
        """Ctrl-C in the middle of a change, at any bytecode."""
        which = data.draw(st.integers(0, len(self.tables) - 1))
        row, table, state = row_of(self.rows[which]), self.tables[which], self.states[which]
        other = PageTable(self.pool, SIZE)
        with interrupted(moment):
            try:
                if change == "insert":
                    self.index.insert(state, row, table.rows[0], self.held[which])
                elif change == "evict":
                    self.index.evict(3)
                elif change == "clear":
                    self.index.clear()
                else:
                    pages, _ = self.index.match(state, row)
                    self.index.touch([pages])
                    if change == "hold":
                        other.hold([pages])
            except KeyboardInterrupt:
                pass
        other.rows = []
        self.settle()

    @invariant()
    def owners_are_rows_and_index(self):
        held: dict[int, int] = {}
        for table in [*getattr(self, "tables", []), *([self.index] if hasattr(self, "index") else [])]:
            for pages in table.rows:
                for page in pages:
                    held[page] = held.get(page, 0) + 1
        if hasattr(self, "pool"):
            assert not self.pool.unsettled
            assert self.pool.in_use == len(held)
            assert all(self.pool.owners(page) == count for page, count in held.items())

    @invariant()
    def rows_hold_their_own_tokens(self):
        for table, row, state, held in zip(
            getattr(self, "tables", []), getattr(self, "rows", []), getattr(self, "states", []), getattr(self, "held", []),
            strict=True,
        ):  # fmt: skip
            for place in range(held):
                page = table.rows[0][place // SIZE]
                assert self.memory[page, place % SIZE] == (state, tuple(row[: place + 1]))

    def teardown(self):
        for table in getattr(self, "tables", []):
            table.clear()
        if hasattr(self, "pool"):
            self.index.clear()
            assert self.pool.in_use == 0
            assert self.index._after == {}


RandomPrefixes.TestCase.settings = settings(max_examples=PROGRAMS, stateful_step_count=30, deadline=None)
TestRandomPrefixes = RandomPrefixes.TestCase


def test_programs_come_upon_pages_that_hold_a_part_of_a_prompt():
    """Found, copied before they are written to, kept with less than they have place for, and where no copy fits."""
    RandomPrefixes.met.clear()
    # The same programs each time: some of what is looked for is rare.
    chosen = settings(max_examples=400, stateful_step_count=30, deadline=None, derandomize=True, database=None)
    run_state_machine_as_test(RandomPrefixes, settings=chosen)
    wanted = {"none", "whole", "partial", "copied", "partial kept", "full", "partial, full"}
    assert {name for name, count in RandomPrefixes.met.items() if count} >= wanted, RandomPrefixes.met


def filled(*prompts: list[int]) -> tuple[PagePool, PrefixIndex]:
    """An index of prompts whose rows have ended."""
    pool = PagePool()
    index = PrefixIndex(pool, SIZE)
    for prompt in prompts:
        pages = pool.allocate(-(-len(prompt) // SIZE))
        index.insert(-1, row_of(prompt), pages, len(prompt))
        pool.release(pages)
    return pool, index


def test_only_whole_pages_unless_a_row_has_ended():
    pool = PagePool()
    index = PrefixIndex(pool, SIZE)
    pages = pool.allocate(3)
    index.insert(-1, row_of(list(range(10))), pages, 10)
    assert index.match(-1, row_of(list(range(12)))) == (pages[:2], 8)
    index.insert(-1, row_of(list(range(10))), pages, 10, partial=True)
    assert index.match(-1, row_of(list(range(12)))) == (pages, 10)
    assert index.match(-2, row_of(list(range(12)))) == ([], 0)


def test_a_page_with_more_tokens_takes_the_place_of_one_with_fewer():
    pool = PagePool()
    index = PrefixIndex(pool, SIZE)
    first, second = pool.allocate(2), pool.allocate(2)
    index.insert(-1, row_of([1, 2, 3, 4, 5]), first, 5, partial=True)
    index.insert(-1, row_of([1, 2, 3, 4, 5, 6, 7, 8]), second, 8)
    assert index.match(-1, row_of([1, 2, 3, 4, 5, 6, 7, 8, 9])) == ([first[0], second[1]], 8)
    assert pool.owners(first[1]) == 1


def test_leaves_go_before_what_they_follow():
    pool, index = filled([1] * 12, [1] * 4 + [2] * 8)
    index.touch([index.match(-1, row_of([1] * 13))[0]])
    index.evict(2)
    assert index.match(-1, row_of([1] * 13))[1] == 12
    assert index.match(-1, row_of([1] * 4 + [2] * 9))[1] == 4
    index.evict(1)
    assert index.match(-1, row_of([1] * 13))[1] == 11 - 3
    assert pool.in_use == 2


def test_a_page_number_used_again_is_followed_by_nothing():
    pool, index = filled([1] * 4 + [2] * 4)
    index.clear()
    pages = pool.allocate(1)
    index.insert(-1, row_of([7] * 4), pages, 4)
    assert index.match(-1, row_of([7] * 4 + [2] * 5)) == (pages, 4)


def test_rows_are_cut_into_pages_once():
    ids = [np.array(row, np.int64) for row in ([1] * 9, [1] * 6 + [2] * 4, [3] * 5)]
    rows = rows_of_tokens(ids, SIZE)
    assert [row.keys for row in rows] == [RowTokens(own, SIZE).keys for own in ids]
    assert rows[1].keys[0] is rows[0].keys[0]


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ([[1, 2, 3], [1, 2, 4], [5, 6]], [(0, 2), (0, 2), (2, 0)]),
        # Four rows of one page against two pairs of five: the pairs save more.
        ([[1, 2, 3, 4, 5]] * 2 + [[1, 6, 7, 8, 9]] * 2, [(0, 5), (0, 5), (2, 5), (2, 5)]),
        ([[1, 2]] * 2 + [[1, 3], [1, 4]], [(0, 1)] * 4),
        ([[-1, 2], [-1, 2]], [(0, 0), (1, 0)]),
        ([], []),
    ],
)
def test_runs_of_rows(rows, runs):
    assert shared_runs(rows) == runs


def test_common_pages():
    assert common_pages([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_pages([1], [2]) == 0
    # A page in common after one that is not does not count.
    assert common_pages([1, 2, 3, 4], [9, 2, 3, 4]) == 0
