"""`ForwardCache`: begin, commit or roll back one forward over pages; reserve and release pages for the decode loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.cache_state import in_turn
from hf_fastattn.cache.crossing import Crossing
from hf_fastattn.cache.dense_cache import DenseCache
from hf_fastattn.cache.forward_batch import forward_batch
from hf_fastattn.cache.forward_states import ForwardStates
from hf_fastattn.cache.known_mask import KnownMask
from hf_fastattn.cache.paged_layer import PagedLayer
from hf_fastattn.cache.recurrent_layer import Pair, RecurrentLayer, own_states
from hf_fastattn.cache.row_states import RowStates
from hf_fastattn.cache.shown_states import ShownStates
from hf_fastattn.kernels.linear.delta_parts import StepStates
from hf_fastattn.pages.page_pool import CacheFullError
from hf_fastattn.pages.page_table import PageTable
from hf_fastattn.transformers_version import CACHE


class ForwardCache(DenseCache):
    """The part of a `PagedCache` that patched models and the device's loop drive; see there.

    A forward is `begin()`, writes and reads of the layers, then `commit()` or `rollback()`. The loop reserves pages ahead,
    says by how much the rows have grown, and releases those that have finished.
    """

    def _settle(self) -> None:
        """Take back what an exception has left half done."""
        self.groups.settle()
        if self._moving is not None:
            self.hold_dense()
        if self._open or self._loose or self._snapshots:
            self.rollback()

    @in_turn
    def begin(
        self,
        batch_size: int,
        query_length: int,
        new: Tensor | None = None,
        dense: bool = False,
        in_place: bool = True,
    ) -> Batch:
        """Reserve pages for a forward; `commit()` or `rollback()` must follow.

        Args:
            batch_size: rows of the forward (B).
            query_length: columns of the forward, padding included (S).
            new: `[B, S]` bool, the columns that hold a token; all of them by default.
            dense: the layers will call `update()` instead of reading pages.
            in_place: linear-attention layers may write to their states in place.

        Raises:
            ValueError: the cache holds another number of rows.
            CacheFullError: the pages do not fit into the memory limit; the cache is as before.
        """
        self._settle()
        lengths = self.lengths or [0] * batch_size
        if len(lengths) != batch_size:
            raise ValueError(
                f"{CACHE} holds {len(lengths)} rows, but the batch has {batch_size}; "
                "use a new cache, or bring it to size with batch_repeat_interleave or batch_select_indices"
            )
        counts = [query_length] * batch_size if new is None else new.sum(1).tolist()
        if self.stream is not None and self.lengths:
            self._make_room([row for row, count in enumerate(counts) if count])
            lengths = self.lengths
        targets = [have + count for have, count in zip(lengths, counts, strict=True)]
        try:
            self.__dict__.update(
                _open=True, _loose=True, _created_rows=not self.lengths, lengths=lengths, _dense=dense,
                _new_stored=new, _query_length=query_length, _snapshots=[], _using=None, _wrote=set(),
            )  # fmt: skip
            self._snapshots = [(layer, layer.snapshot(in_place)) for layer in self.recurrent_layers.values()]
            if self._created_rows:
                for table in self.tables.values():
                    table.add_rows(batch_size)
            self._reserve_pages(targets, self.ahead_of(self._columns + query_length))
            self._batch = forward_batch(self.groups, self.tables, lengths, counts, targets)
            return self._batch
        except CacheFullError as full:
            self.rollback()
            raise CacheFullError(self.groups.describe_full(targets)) from full
        except BaseException:
            self.rollback()
            raise

    def _make_room(self, rows: Sequence[int]) -> None:
        """Full rows among `rows`, which are to get a token, let their oldest tokens go but for the sinks.

        What has gone stays gone if the forward fails: for the same token it would go again.
        """
        layout = self.stream
        assert layout is not None
        full = [row for row in rows if self.lengths[row] >= layout.capacity]
        if full:
            lengths = [length - layout.step if row in set(full) else length for row, length in enumerate(self.lengths)]
            self._exchange({"lengths": lengths}, lambda table: table.slid(full, layout, self.counters))

    def own_rows(self, tokens: int) -> None:
        """Rows that become full within `tokens` more own all pages that they will write anew; see `kernels.sampling.slide`.

        Raises:
            CacheFullError: the copies do not fit into the memory limit.
        """
        layout = self.stream
        assert layout is not None
        rows = [row for row, length in enumerate(self.lengths) if length + tokens > layout.capacity]
        if rows:
            copy_pages = self.groups.group(None).copy_pages
            self._exchange({}, lambda table: table.owning(rows, layout.sinks, self.counters, copy_pages))

    @in_turn
    def _exchange(self, changes: dict[str, Any], changed: Callable[[PageTable], PageTable]) -> None:
        """Hold the tables that `changed` makes of those so far, in one step with other `changes`."""
        self.groups.settle()
        # Pages have two owners until the old tables are cleared.
        for table in self.tables.values():
            table.pool.unsettled = True
        try:
            new = {window: changed(table) for window, table in self.tables.items()}
        except CacheFullError as full:
            self.groups.settle()
            raise CacheFullError(self.groups.describe_full(self.lengths)) from full
        self.exchange_tables(new, changes)

    def _reserve_pages(self, targets: list[int], ahead: int) -> None:
        is_prompt = not self._columns
        if self.stream is not None:
            most = self.stream.capacity
            if max(targets, default=0) > most:
                raise ValueError(
                    f"a forward of {max(targets)} tokens does not fit into the {most} that {self.groups.streaming} leaves a "
                    "row; give a prompt to the patched model, which computes it in pieces"
                )
            ahead = max(min(ahead, most - min(targets, default=0)), 0)
        # A row of which a first piece of the prompt has padding only gets its tokens later.
        sure = [max(target, 1) for target in targets] if is_prompt else targets
        # Rows that go on as forks of others copy the page that they write to.
        copies = len(targets) if self.counters.pages_shared and not is_prompt else 0
        for window, table in self.tables.items():
            group = self.groups.group(window)
            if not self._reserved_ahead:
                group.ensure(table.pages_to(self.lengths, sure, ahead) + copies)
            table.reserve(self.lengths, targets, ahead, self.counters, group.copy_pages)
        self._reserved_ahead = not is_prompt

    @in_turn
    def grow_tensors(self) -> None:
        """Give every page its place in the tensors, before a graph is captured or replayed over them."""
        for window in self.tables:
            group = self.groups.group(window)
            if group.storage.capacity < group.pool.capacity:
                group.grow_storage(self.groups.alike)

    @contextmanager
    def using(
        self, batch: Batch, states: RowStates | ForwardStates | None = None, crossing: Crossing | None = None
    ) -> Iterator[None]:
        """Layers read and write by `batch`: instead of that of the forward under way, or with none under way.

        `states` are those of linear-attention layers, for steps that do not keep them in the layers. `crossing` says how
        layers on other devices go on.
        """
        before = {"_using": self._using, "_row_states": self._row_states, "_crossing": self._crossing}
        self.__dict__.update(_using=batch, _row_states=states, _crossing=crossing)
        try:
            yield
        finally:
            self.__dict__.update(before)

    def go_on(self, place: torch.device, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states, and what is to be added to them, on another device, where the layers that follow are."""
        crossing, states = self._crossing, (x,) if delta is None else (x, delta)
        if crossing is None:
            moved = [tensor.to(place, non_blocking=True) for tensor in states]
        else:
            self._using, moved = crossing.batches[place], crossing.send(states, place)
        return moved[0], None if delta is None else moved[1]

    def positions_on(self, place: torch.device, position_ids: Tensor) -> Tensor:
        """Positions of the forward's tokens on another device."""
        return position_ids.to(place, non_blocking=True) if self._crossing is None else self._crossing.positions[place]

    def step_states(self, index: int) -> StepStates | None:
        """Where a step under way has the states of a layer, if they are in slots."""
        batch = self._using
        if self._row_states is None or batch is None:
            return None
        return self._row_states.of(index, batch.rows, batch.on(self._row_states.device).seq_lens)

    def layer_states(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Inputs of the convolution `[B, C, K]` and state `[B, HV, DK, DV]` of a layer; None before the first forward."""
        states: tuple[Tensor, Tensor] | None = self.layers[index].states
        return states

    def keep_states(self, index: int, conv: Tensor, recurrent: Tensor) -> None:
        """The forward under way leaves a layer with these; a rollback brings back those before."""
        self.layers[index].keep(conv, recurrent)

    def past_states(self, index: int) -> list[Pair] | None:
        """States of a layer before each of its last tokens, and those that it has, if they are to be recorded; else None."""
        layer: RecurrentLayer = self.layers[index]
        if not layer.record_past:
            return None
        # Nobody writes over a past.
        own_states(layer.__dict__)
        # Columns are counted back: past those that hold no token, a token is not a column.
        past = layer.past if self._new_stored is None else ()
        return list(past or ([] if layer.states is None else [layer.states]))

    def keep_past(self, index: int, past: list[Pair]) -> None:
        """The forward under way leaves a layer with the last of these states, and has recorded the others."""
        self.layers[index].keep(*past[-1], tuple(past))

    def move_states(self, index: int, conv: Tensor, recurrent: Tensor) -> None:
        """The states of a layer, the same ones, lie here from now on; a rollback leaves them there."""
        moved: RecurrentLayer = self.layers[index]
        moved.keep(conv, recurrent)
        self._snapshots = [(layer, layer.snapshot(False) if layer is moved else held) for layer, held in self._snapshots]

    @in_turn
    def commit(self, release: bool = True, **more: Any) -> None:
        """The forward is done: its tokens belong to the cache, and pages behind a window are released.

        Args:
            release: pages behind a window.
            more: attributes that change at the same time.
        """
        batch, columns, stored = self._batch, self._columns + self._query_length, self._stored
        assert batch is not None
        if self._new_stored is not None:
            stored = host_masks.beside(self._stored_until(self._columns), self._new_stored.cpu())
        replaced, lengths = self._replaced, batch.known.seq_lens
        changes = {"lengths": lengths, "_columns": columns, "_stored": stored}
        if len(self._shown) or len(self._shown_new):
            changes.update(_shown=self._shown_new.carried(batch, lengths), _shown_new=ShownStates())
        self.__dict__.update({**self._closed(), **changes})
        for (index, name), states in replaced.items():
            self.replace(index, name, states)
        if release:
            self.release_behind()

    @in_turn
    def rollback(self) -> None:
        """The forward failed: the cache is as before it."""
        self.groups.settle()
        for layer, held in self._snapshots:
            layer.restore(held)
        # The tables stay loose until they fit.
        lengths = [] if self._created_rows else self.lengths
        self.__dict__.update({**self._closed(), "lengths": lengths, "_loose": True})
        self._fit_tables()
        for window in self.tables:
            # Pages that the allocation failed for would be asked for again.
            group = self.groups.group(window)
            group.pool.shrink(group.storage.capacity)

    def save_memory(self) -> bool:
        """Memory ran out: make no page before it is needed from now on; whether that leaves more of it than before."""
        ahead = 0 if self._is_frugal else self.ahead_of(self._columns)
        self._is_frugal = True
        idle = [group for group in self.groups if not group.pool.in_use and group.storage.nbytes]
        for group in idle:
            group.pool.shrink(0)
            group.storage.clear()
        return self.groups.reclaim() or bool(ahead or idle)

    @property
    def paged_batch(self) -> Batch | None:
        """The batch of the forward under way, if its layers are to read pages."""
        if self._using is not None:
            return self._using
        return self._batch if self._open and not self._dense else None

    @property
    def steps_to_come(self) -> int:
        """Forwards of a token a row that the call under way makes after this one, at most."""
        return max(self.room - self._columns - self._query_length - 1, 0)

    @property
    def lengths_ahead(self) -> list[int]:
        """Tokens of each row behind the forward under way."""
        return self.lengths if self._batch is None else self._batch.known.seq_lens

    @in_turn
    def reserve_more(self, tokens: int) -> None:
        """Give every row that was not released pages for `tokens` more.

        Raises:
            CacheFullError: they do not fit into the memory limit; some rows have got pages, which `trim()` releases.
        """
        targets = [length + tokens if length else 0 for length in self.lengths]
        if self.stream is not None:
            targets = [min(target, self.stream.capacity) for target in targets]
        try:
            # These tokens are ahead themselves, but for one.
            self._reserve_pages(targets, max(self.ahead_of(self._columns + 1) - tokens + 1, 0))
        except CacheFullError as full:
            raise CacheFullError(self.groups.describe_full(targets)) from full

    def grow_by(self, tokens: int) -> None:
        """Every row that was not released has become `tokens` longer, or shorter, on the device."""
        if self.stream is not None:
            for _ in range(tokens):
                self._make_room([row for row, length in enumerate(self.lengths) if length])
                lengths = [length + 1 if length else 0 for length in self.lengths]
                self.__dict__.update(lengths=lengths, _columns=self._columns + 1)
            return
        lengths = [length + tokens if length else 0 for length in self.lengths]
        self.__dict__.update(lengths=lengths, _columns=self._columns + tokens)

    @in_turn
    def release_rows(self, rows: Sequence[int]) -> None:
        """Release the pages of rows that nobody will read or write any more."""
        gone = set(rows)
        self.lengths = [0 if row in gone else length for row, length in enumerate(self.lengths)]
        for table in self.tables.values():
            table.release_rows(rows)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Row b becomes what row `rows[b]` was, with the pages reserved for what is to come; the others are let go."""
        self._take_rows(rows)

    @in_turn
    def _take_rows(self, rows: Sequence[int]) -> None:
        """Row b becomes a fork of row `rows[b]`, in tables, layers and all else at the same time."""
        self.groups.settle()
        # Pages have two owners until the old tables are cleared; `unsettled` has owners recounted if an exception comes
        # before that.
        for table in self.tables.values():
            table.pool.unsettled = True
        stored = self._stored
        new = {window: table.selected(rows, self.counters) for window, table in self.tables.items()}
        changes: dict[str, Any] = {"lengths": [self.lengths[row] for row in rows], "_snapshots": []}
        changes["_reserved_ahead"] = self._reserved_ahead and len(rows) <= len(self.lengths)
        changes["hidden"] = {index: hidden.select(list(rows)) for index, hidden in self.hidden.items()}
        if stored is not None:
            changes["_stored"] = stored[list(rows)]
            if not host_masks.equal(stored, changes["_stored"]):
                changes["known_mask"] = KnownMask()
        self._snapshots = [(layer, layer.snapshot(False)) for layer in self.recurrent_layers.values()]
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                layer.reorder_cache(torch.tensor(rows, device="cpu"))
        self.exchange_tables(new, changes)

    @property
    def shares_pages(self) -> bool:
        """Whether neighbouring rows are known to share pages."""
        return any(table.shares_pages for table in self.tables.values())

    def regroup(self) -> None:
        """Look anew at which neighbouring rows share pages, and so can be read together."""
        for table in self.tables.values():
            table.regroup()

    @in_turn
    def trim(self) -> None:
        """Release the pages beyond the rows' tokens."""
        for table in self.tables.values():
            table.trim(self.lengths)

    def release_behind(self, margin: int = 0) -> None:
        """Release pages that no query can see through its window, from `margin` tokens before the newest on."""
        if not self.record_past:
            self._release_behind(margin)

    def _release_behind(self, margin: int = 0) -> None:
        for table in self.tables.values():
            table.release_behind([max(length - margin, 0) for length in self.lengths])
