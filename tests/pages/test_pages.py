"""The page allocator and the tables under random programs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_fastattn.counters import CallCounters
from hf_fastattn.pages.page_pool import CacheFullError, PagePool, Spare
from hf_fastattn.pages.page_table import PageTable
from tests.bad_input.interrupting import interrupted

SIZE = 4


class RandomTables(RuleBasedStateMachine):
    """Tables of one pool, against a model in which every row is simply a list of tokens."""

    @initialize(limit=st.one_of(st.none(), st.integers(4, 40)), window=st.one_of(st.none(), st.integers(1, 9)))
    def start(self, limit, window):
        self.pool = PagePool(0, limit)
        self.window = window
        self.counters = CallCounters()
        self.tables: list[PageTable] = []
        self.rows: list[list[list[int]]] = []
        self.memory: dict[int, list[int | None]] = {}
        self.next_token = 0
        self.uploaded: dict[int, list[list[int]]] = {}

    @precondition(lambda self: len(self.tables) < 3)
    @rule(rows=st.integers(1, 3))
    def new_table(self, rows):
        table = PageTable(self.pool, SIZE, self.window)
        table.add_rows(rows)
        self.tables.append(table)
        self.rows.append([[] for _ in range(rows)])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), ahead=st.integers(0, 40))
    def append(self, data, ahead):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        table, rows = self.tables[which], self.rows[which]
        lengths = [len(row) for row in rows]
        targets = [length + data.draw(st.integers(0, 7)) for length in lengths]

        def copy_pages(moves):
            for source, target in moves:
                assert self.pool.owners(source), "a freed page would be copied"
                self.memory[target] = list(self.memory[source])

        try:
            table.reserve(lengths, targets, ahead, self.counters, copy_pages)
        except CacheFullError:
            table.trim(lengths)
            return
        for row, (length, target) in enumerate(zip(lengths, targets, strict=True)):
            for token in range(length, target):
                page = table.rows[row][token // SIZE]
                assert self.pool.owners(page) == 1, "a shared page would be written"
                if token % SIZE == 0:
                    self.memory[page] = [None] * SIZE
                self.memory[page][token % SIZE] = self.next_token
                rows[row].append(self.next_token)
                self.next_token += 1
        table.release_behind([len(row) for row in rows])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def select(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        table, rows = self.tables[which], self.rows[which]
        table.trim([len(row) for row in rows])
        picks = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
        self.tables[which] = table.selected(picks, self.counters)
        table.clear()
        self.rows[which] = [list(rows[pick]) for pick in picks]

    @precondition(lambda self: self.tables and self.window is None)
    @rule(data=st.data())
    def crop(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        for row in self.rows[which]:
            del row[len(row) - data.draw(st.integers(0, min(len(row), 6))) :]
        self.tables[which].trim([len(row) for row in self.rows[which]])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def look_at_the_array(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        table, rows = self.tables[which], self.rows[which]
        array, version = table.as_array()
        for row, (pages, tokens) in enumerate(zip(table.rows, rows, strict=True)):
            first = 0 if self.window is None else max(len(tokens) - self.window + 1, 0)
            columns = slice(first // SIZE, -(-len(tokens) // SIZE))
            assert array[row, columns].tolist() == pages[columns]
        # With a window of one, the page of the newest token may be released once that token was read.
        if all(rows) and self.window != 1:
            slots = table.newest_slots(np.array([len(row) for row in rows], np.int32))
            assert [self.memory[slot // SIZE][slot % SIZE] for slot in slots.tolist()] == [row[-1] for row in rows]
        # Who has uploaded the array of this version need not do so again.
        assert self.uploaded.setdefault(version, array.tolist()) == array.tolist()

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow_token_by_token(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        table, rows = self.tables[which], self.rows[which]
        for _ in range(data.draw(st.integers(1, 9))):
            lengths = [len(row) for row in rows]
            targets = [length + 1 for length in lengths]

            def copy_pages(moves):
                for source, target in moves:
                    self.memory[target] = list(self.memory[source])

            try:
                table.reserve(lengths, targets, 0, self.counters, copy_pages)
            except CacheFullError:
                table.trim(lengths)
                return
            for row, length in enumerate(lengths):
                page = table.rows[row][length // SIZE]
                assert self.pool.owners(page) == 1, "a shared page would be written"
                if length % SIZE == 0:
                    self.memory[page] = [None] * SIZE
                self.memory[page][length % SIZE] = self.next_token
                rows[row].append(self.next_token)
                self.next_token += 1
            table.release_behind(targets)

    @precondition(lambda self: self.tables and len(self.tables) < 3)
    @rule(data=st.data())
    def fork_a_table(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables[which].trim([len(row) for row in self.rows[which]])
        other = PageTable(self.pool, SIZE, self.window)
        self.tables[which].fork_into(other, [len(row) for row in self.rows[which]])
        self.tables.append(other)
        self.rows.append([list(row) for row in self.rows[which]])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def drop_table(self, data):
        which = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables.pop(which).clear()
        self.rows.pop(which)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), moment=st.integers(0, 400), change=st.sampled_from(["reserve", "select", "fork", "let go"]))
    def interrupt(self, data, moment, change):
        """A change that Ctrl-C may cut off, at any bytecode, is taken back."""
        which = data.draw(st.integers(0, len(self.tables) - 1))
        table, lengths = self.tables[which], [len(row) for row in self.rows[which]]

        def copy_pages(moves):
            for source, target in moves:
                self.memory[target] = list(self.memory[source])

        with interrupted(moment):
            try:
                if change == "reserve":
                    table.reserve(lengths, [length + 5 for length in lengths], 0, self.counters, copy_pages)
                elif change == "select":
                    table.selected([0, 0], self.counters)
                elif change == "fork":
                    table.fork_into(PageTable(self.pool, SIZE, self.window), lengths)
                else:
                    other = table.selected(range(len(lengths)), self.counters)
                    other.release_rows([0])
                    other.clear()
            except (KeyboardInterrupt, CacheFullError):
                pass
        self.pool.recount(pages for held in self.tables for pages in held.rows)
        for held in self.tables:
            held.forget_derived()
        table.trim(lengths)

    @precondition(lambda self: hasattr(self, "pool"))
    @rule(capacity=st.integers(0, 10))
    def shrink(self, capacity):
        self.pool.shrink(capacity)

    @invariant()
    def every_row_reads_its_own_tokens(self):
        for table, rows in zip(getattr(self, "tables", []), getattr(self, "rows", []), strict=True):
            for pages, row in zip(table.rows, rows, strict=True):
                first = 0 if self.window is None else max(len(row) - self.window + 1, 0)
                for token in range(first, len(row)):
                    page = pages[token // SIZE]
                    assert self.memory[page][token % SIZE] == row[token]

    @invariant()
    def owners_are_the_rows_that_hold_the_page(self):
        held: dict[int, int] = {}
        for table in getattr(self, "tables", []):
            for pages in table.rows:
                for page in pages:
                    if page >= 0:
                        held[page] = held.get(page, 0) + 1
        if hasattr(self, "pool"):
            assert self.pool.in_use == len(held)
            assert all(self.pool.owners(page) == count for page, count in held.items())
            assert self.pool.max_pages is None or self.pool.capacity <= self.pool.max_pages

    @invariant()
    def prefixes_are_shared(self):
        for table, rows in zip(getattr(self, "tables", []), getattr(self, "rows", []), strict=True):
            for first, last, columns in table.prefixes([len(row) for row in rows]):
                assert last - first > 1
                assert len({tuple(table.rows[row][:columns]) for row in range(first, last)}) == 1
                assert all(len(rows[row]) >= columns * SIZE for row in range(first, last))

    def teardown(self):
        for table in getattr(self, "tables", []):
            table.clear()
        if hasattr(self, "pool"):
            assert self.pool.in_use == 0


RandomTables.TestCase.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
TestRandomTables = RandomTables.TestCase


def test_runs_are_adjacent_and_grow_in_place():
    pool = PagePool()
    pool.ensure(12)
    first, second = pool.allocate_rows([2, 3], [8, 4])
    assert (first, second) == ([0, 1], [8, 9, 10])
    assert pool.allocate(2, after=1) == [2, 3]
    assert pool.allocate(1, after=7) != [8]
    assert pool.capacity == 12


@pytest.mark.parametrize(("window", "shared"), [(None, [(0, 2, 2)]), (6, [])])
def test_rows_behind_a_window_share_no_prefix(window, shared):
    """Of two forks of 8 tokens one grows, and releases a page that the other still holds."""
    table, counters = PageTable(PagePool(), SIZE, window), CallCounters()
    table.add_rows(1)
    table.reserve([0], [8], 0, counters, lambda moves: None)
    table, before = table.selected([0, 0], counters), table
    before.clear()
    table.reserve([8, 8], [9, 8], 0, counters, lambda moves: None)
    table.release_behind([9, 8])
    assert [row[0] for row in table.rows] == ([0, 0] if window is None else [-1, 0])
    assert table.prefixes([9, 8]) == shared


def test_full_pool_says_what_fits_and_takes_nothing():
    pool = PagePool(max_pages=4)
    pool.allocate(3)
    with pytest.raises(CacheFullError, match="2 pages were asked for and 1 of at most 4 are free"):
        pool.allocate(2)
    with pytest.raises(CacheFullError, match="2 pages were asked for and 1 of at most 4"):
        pool.allocate_rows([1, 1], [1, 1])
    assert pool.in_use == 3


def test_misuse_is_named():
    pool = PagePool()
    [page] = pool.allocate(1)
    pool.release([page])
    with pytest.raises(ValueError, match="released twice"):
        pool.release([page])
    with pytest.raises(ValueError, match="only a held page"):
        pool.fork([page])
    with pytest.raises(ValueError, match="count=-1"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="capacity=5"):
        PagePool(5, max_pages=2)


def test_a_pool_grows_by_its_spare_if_it_has_to():
    pool = PagePool(100)
    pool.spare = Spare(0.5, 20)
    pool.ensure(100)
    assert pool.capacity == 100
    pool.ensure(101)
    assert pool.capacity == 150
    pool.ensure(400)
    assert pool.capacity == 400
    small = PagePool(10)
    small.spare = Spare(0.5, 20)
    small.ensure(11)
    assert small.capacity == 30


def test_no_spare_beyond_what_kept_pages_may_take():
    pool = PagePool(100, max_pages=200)
    pool.spare = Spare(0.5, most=120)
    pool.ensure(101)
    assert pool.capacity == 120
    pool.ensure(130)
    assert pool.capacity == 130
    pool.spare = Spare(2.0)
    pool.ensure(131)
    assert pool.capacity == 200
