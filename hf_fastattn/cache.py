"""`PagedCache`: a Transformers `Cache` whose keys and values live in pages."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from hf_fastattn.batch import Batch
from hf_fastattn.cache_layer import PagedLayer
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.counters import CallCounters
from hf_fastattn.dense import dense_slots, dense_tokens
from hf_fastattn.dense_cache import DenseCache
from hf_fastattn.dense_layers import DenseLayers
from hf_fastattn.forward_batch import forward_batch
from hf_fastattn.own_pages import own_pages
from hf_fastattn.padding import Padding
from hf_fastattn.page_groups import (
    Holder,
    PageGroups,
    cache_layout,
    is_pageable,
    is_recurrent,
    layer_window,
    template_layers,
)
from hf_fastattn.page_table import PageTable
from hf_fastattn.pages import CacheFullError
from hf_fastattn.recurrent_layer import RecurrentLayer
from hf_fastattn.seen_mask import SeenMask
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.turn import Token

# Seconds that a thread waits for another one that works with the same pages before it goes on with pages of its own.
PATIENCE = 0.05

Params = ParamSpec("Params")
Result = TypeVar("Result")


def _in_turn(
    change: Callable[Concatenate[PagedCache, Params], Result],
) -> Callable[Concatenate[PagedCache, Params], Result]:
    """The method runs while no other thread changes the same pages."""

    @functools.wraps(change)
    def in_turn(self: PagedCache, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        if self.groups.turn.is_mine():
            return change(self, *args, **kwargs)
        return (self.take_turn(), change(self, *args, **kwargs))[1]

    return in_turn


class PagedCache(DenseCache):
    """Keys and values of a batch of rows, in pages of a pool (Kwon et al., 2023, "PagedAttention").

    Only tokens that the attention mask shows are stored; `get_seq_length()` counts padding too, as Transformers
    expects. Rows share pages after `reorder_cache`, `batch_repeat_interleave` and `batch_select_indices`, and copy the
    last, partial one when they write. A patched model reads the pages in place. For any other model, and once somebody
    replaces the keys of a layer, the cache holds Transformers' own dense layers (`dense`) and does what a `DynamicCache`
    does; the next forward of a patched model takes them into pages again, or runs on them where pages cannot hold
    them. Linear-attention layers keep their recurrent states as in Transformers.

    Args:
        config: the model's configuration (`model.config`).
        fastattn_config: page size and memory limit; ignored if `groups` is given. Without both, the cache has the
            options, and the pages, of the patched model that it is first given to.
        groups: pages to use, of a patched model; new ones by default.
        counters: where pages are counted.
        room: tokens that a row is expected to reach, to choose pages it can grow into.

    Raises:
        ValueError: no layer of the model can be paged.
    """

    def __init__(
        self,
        config: Any,
        fastattn_config: FastAttnConfig | None = None,
        *,
        groups: PageGroups | None = None,
        counters: CallCounters | None = None,
        room: int = 0,
    ) -> None:
        self._config = config
        templates = template_layers(config)
        self._layout = cache_layout(config, templates)
        self._options = fastattn_config
        self.groups = groups or PageGroups(config, fastattn_config or FastAttnConfig())
        self.counters = counters or CallCounters()
        self.room = room
        self.record_past = False
        # A user's dense layers, which get their keys back after a call; what pages leave out of them is kept aside.
        self.lent = None
        layers = [self._own_layer(index, layer) for index, layer in enumerate(templates)]
        super().__init__(layers=layers)
        self._paged = [layer for layer in layers if isinstance(layer, PagedLayer)]
        self._recurrent_places = [place for place, layer in enumerate(layers) if isinstance(layer, RecurrentLayer)]
        if not self._paged:
            raise ValueError(f"no layer of a {config.model_type} model can be paged; use Transformers' own cache")
        self.tables = self._tables_in(self.groups)
        self.__dict__.update(self._empty_state())
        self._holder: Holder = self.groups.enlist(self, self.tables)

    def _own_layer(self, index: int, template: Any) -> Any:
        if is_pageable(template):
            return PagedLayer(self, index, layer_window(template))
        return RecurrentLayer(template.number_of_states) if is_recurrent(template) else template

    def _tables_in(self, groups: PageGroups) -> dict[int | None, PageTable]:
        windows = dict.fromkeys(layer.window for layer in self._paged)
        return {window: PageTable(groups.group(window).pool, groups.page_size, window) for window in windows}

    def adopt(self, groups: PageGroups, config: Any) -> None:
        """Live in `groups`, of a model with `config`, from now on, if the cache was made without options and holds no page.

        Raises:
            ValueError: the cache was made for another model.
        """
        self.check_owner(config)
        if self.may_adopt and self.groups is not groups:
            self._live_in(groups, self._tables_in(groups))

    @property
    def may_adopt(self) -> bool:
        """Whether `adopt` would do anything."""
        return self._options is None and not self.lengths and not self._open

    # What belongs together changes in one step, `self.__dict__.update(...)`: an exception, Ctrl-C included, may come between
    # any two statements. What it leaves half done, `_settle()` takes back before anything else is done with the cache.
    lengths: list[int]
    _columns: int
    # Of the first columns; all that came after them hold tokens.
    _stored: Tensor | None
    seen_mask: SeenMask
    _batch: Batch | None
    _snapshots: list[tuple[RecurrentLayer, dict[str, Any]]]
    padding: Padding | None
    _new_stored: Tensor | None
    _query_length: int
    _dense: bool
    _open: bool
    _created_rows: bool
    # Tables may hold more than `lengths` tells.
    _loose: bool
    # What layers read and write instead of the forward under way.
    _reading: Batch | None
    _reserved_ahead: bool
    # Columns that dense layers are known to hold tokens in.
    _known_stored: Tensor | None
    # Columns at which recording of the past began anew: those before are there as far as a window reached then.
    _past_from: int
    # Layers that the forward under way has written to.
    _wrote: set[int]
    # What somebody sets on a layer while a forward is under way holds from its end on.
    _replaced: dict[tuple[int, str], Tensor | None]
    # Dense layers that keys are being moved into.
    _moving: DenseLayers | None

    def _empty_state(self) -> dict[str, Any]:
        return {
            "lengths": [], "_columns": 0, "_stored": None, "seen_mask": SeenMask(), "_query_length": 0, "_dense": False,
            "_reserved_ahead": False, "dense": None, "hidden": {}, "_known_stored": None, "_past_from": 0, "_moving": None,
            **self._closed(),
        }  # fmt: skip

    @staticmethod
    def _closed() -> dict[str, Any]:
        """The state without a forward under way."""
        return {
            "_open": False, "_batch": None, "_new_stored": None, "padding": None, "_snapshots": [], "_wrote": set(),
            "_replaced": {}, "_created_rows": False, "_loose": False, "_reading": None,
        }  # fmt: skip

    def take_turn(self) -> Token | None:
        """Nobody else changes the cache's pages while the token exists, which no variable should hold; see `Turn`.

        If another thread goes on changing pages of the same groups, the cache gets pages of its own.
        """
        return self.groups.turn.take(PATIENCE) or self._move_out()

    def _move_out(self) -> Token | None:
        if self.groups.turn.is_mine():
            return None
        groups, tables = own_pages(self.groups, self.tables)
        self._live_in(groups, tables)
        return self.groups.turn.take(PATIENCE)

    def _live_in(self, groups: PageGroups, tables: dict[int | None, PageTable]) -> None:
        """Hold what `tables` of `groups` hold, and nothing of the groups so far."""
        before_groups, before, holder = self.groups, self._holder, groups.enlist(self, tables)
        before.tables = self.tables
        self.__dict__.update(groups=groups, tables=tables, _holder=holder, _reserved_ahead=False)
        before_groups.discharge(before)

    def _settle(self) -> None:
        """Take back what an exception has left half done."""
        self.groups.settle()
        if self._moving is not None:
            self.hold_dense()
        if self._open or self._loose or self._snapshots:
            self.rollback()

    # ---- one forward ------------------------------------------------------------------------------------------

    @_in_turn
    def begin(self, batch_size: int, query_length: int, new: Tensor | None = None, dense: bool = False) -> Batch:
        """Reserve pages for a forward; `commit()` or `rollback()` must follow.

        Args:
            batch_size: rows of the forward (B).
            query_length: columns of the forward, padding included (S).
            new: `[B, S]` bool, the columns that hold a token; all of them by default.
            dense: the layers will call `update()` instead of reading pages.

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
        targets = [have + count for have, count in zip(lengths, counts, strict=True)]
        try:
            self.__dict__.update(
                _open=True, _loose=True, _created_rows=not self.lengths, lengths=lengths, _dense=dense,
                _new_stored=new, _query_length=query_length, _snapshots=[], _reading=None,
            )  # fmt: skip
            self._snapshots = [(layer, layer.snapshot()) for layer in self._recurrent]
            if self._created_rows:
                for table in self.tables.values():
                    table.add_rows(batch_size)
            self._reserve_pages(targets)
            self._batch = forward_batch(self.groups, self.tables, lengths, counts, targets)
            return self._batch
        except CacheFullError as full:
            self.rollback()
            raise CacheFullError(self.groups.describe_full(targets)) from full
        except BaseException:
            self.rollback()
            raise

    def _reserve_pages(self, targets: list[int]) -> None:
        for window, table in self.tables.items():
            group, room = self.groups.group(window), max([self.room, *targets])
            table.reserve(self.lengths, targets, room, self.counters, group.copy_pages)

    @_in_turn
    def reserve_ahead(self) -> None:
        """Make room, once, for the tokens that the rows are expected to reach, so that pages need not move meanwhile."""
        for window, table in self.tables.items():
            group = self.groups.group(window)
            if not self._reserved_ahead:
                group.pool.ensure(table.pages_to_come(self.lengths, self.room))
            if group.storage.capacity < group.pool.capacity:
                group.grow_storage()
        self._reserved_ahead = True

    @contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """Layers read and write by `batch`: instead of that of the forward under way, or with none under way."""
        before, self._reading = self._reading, batch
        try:
            yield
        finally:
            self._reading = before

    @_in_turn
    def commit(self, release: bool = True, **more: Any) -> None:
        """The forward is done: its tokens belong to the cache, and pages behind a window are released.

        Args:
            release: pages behind a window.
            more: attributes that change at the same time.
        """
        batch, columns, stored = self._batch, self._columns + self._query_length, self._stored
        assert batch is not None
        if self._new_stored is not None:
            stored = torch.cat((self._stored_until(self._columns), self._new_stored.cpu()), 1)
        replaced = self._replaced
        self.__dict__.update({**self._closed(), "lengths": batch.seq_lens, "_columns": columns, "_stored": stored})
        for (index, name), states in replaced.items():
            self.replace(index, name, states)
        if release:
            self.release_behind()

    @_in_turn
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
            # Pages that there was no memory for would be asked for again.
            group = self.groups.group(window)
            group.pool.shrink(group.storage.capacity)

    def _fit_tables(self, keep_states: bool = False) -> None:
        """Tables and, unless they are to be kept, linear-attention layers hold what `lengths` tells."""
        for table in self.tables.values():
            if self.lengths:
                table.trim(self.lengths)
            else:
                table.clear()
        for layer in self.layers:
            if not (self.lengths or keep_states or self.dense is not None or isinstance(layer, PagedLayer)):
                layer.reset()
        self._loose = False

    @property
    def _recurrent(self) -> list[RecurrentLayer]:
        return [self.layers[place] for place in self._recurrent_places]

    def check_owner(self, config: Any) -> None:
        """Raise a `ValueError` if the cache was made for a model that stores other keys than that of `config`."""
        if config is self._config:
            return
        ours, theirs = self._layout, cache_layout(config)
        if ours != theirs:
            raise ValueError(
                f"{CACHE} was made for a model of (key heads, head dim, windows by layer) {ours}, but this one "
                f"has {theirs}; use PagedCache(model.config)"
            )
        # The next forward compares identities only.
        self._config = config

    @property
    def paged_batch(self) -> Batch | None:
        """The batch of the forward under way, if its layers are to read pages."""
        if self._reading is not None:
            return self._reading
        return self._batch if self._open and not self._dense else None

    def pages_for(self, layer_idx: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """The K and V pages `[N, P, G, D]` that layer `layer_idx` writes `states [..., G, D]` to."""
        window = self.layers[layer_idx].window
        group = self.groups.group(window)
        self._wrote.add(layer_idx)

        def is_alone() -> bool:
            held = sum(page >= 0 for pages in self.tables[window].rows for page in pages)
            return self._columns == 0 and held == group.pool.in_use

        return group.storage.layer(layer_idx, states, group.pool.capacity, is_alone)

    # ---- a loop that writes to pages by itself ----------------------------------------------------------------

    @_in_turn
    def reserve_more(self, tokens: int) -> None:
        """Give every row, but those let go, pages for `tokens` more.

        Raises:
            CacheFullError: they do not fit into the memory limit; some rows have got pages, which `trim()` releases.
        """
        targets = [length + tokens if length else 0 for length in self.lengths]
        try:
            self._reserve_pages(targets)
        except CacheFullError as full:
            raise CacheFullError(self.groups.describe_full(targets)) from full

    def grow_by(self, tokens: int) -> None:
        """Every row, but those let go, has become `tokens` longer, or shorter, on the device."""
        lengths = [length + tokens if length else 0 for length in self.lengths]
        self.__dict__.update(lengths=lengths, _columns=self._columns + tokens)

    @_in_turn
    def let_go(self, rows: Sequence[int]) -> None:
        """Release the pages of rows that nobody will read or write any more."""
        gone = set(rows)
        self.lengths = [0 if row in gone else length for row, length in enumerate(self.lengths)]
        for table in self.tables.values():
            table.let_go(rows)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Row b becomes what row `rows[b]` was, with the pages reserved for what is to come; the others are let go."""
        self._take_rows(rows)

    @_in_turn
    def _take_rows(self, rows: Sequence[int]) -> None:
        """Row b becomes a fork of row `rows[b]`, in tables, layers and all else at the same time."""
        self.groups.settle()
        # Until old tables are cleared their pages count twice; an exception before has them counted anew.
        for table in self.tables.values():
            table.pool.unsettled = True
        stored = self._stored
        new = {window: table.selected(rows, self.counters) for window, table in self.tables.items()}
        changes: dict[str, Any] = {"lengths": [self.lengths[row] for row in rows], "_snapshots": []}
        changes["hidden"] = {index: hidden.select(list(rows)) for index, hidden in self.hidden.items()}
        if stored is not None:
            changes["_stored"] = stored[list(rows)]
            if not torch.equal(stored, changes["_stored"]):
                changes["seen_mask"] = SeenMask()
        self._snapshots = [(layer, layer.snapshot()) for layer in self._recurrent]
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                layer.reorder_cache(torch.tensor(rows, device="cpu"))
        self.exchange_tables(new, changes)

    def exchange_tables(self, tables: dict[int | None, PageTable], changes: dict[str, Any]) -> None:
        """Hold what `tables` hold instead, in one step with other `changes`; their pools are unsettled until then."""
        before = self.tables
        self.__dict__.update({**changes, "tables": tables})
        self._holder.tables = tables
        for table in before.values():
            table.clear()
        for table in tables.values():
            table.pool.unsettled = False

    @_in_turn
    def trim(self) -> None:
        """Release the pages beyond the rows' tokens."""
        for table in self.tables.values():
            table.trim(self.lengths)

    def release_behind(self, margin: int = 0) -> None:
        """Release pages that no query can see through its window, from `margin` tokens before the newest on."""
        if not self.record_past:
            self._release_behind(margin)

    # ---- what Transformers calls ------------------------------------------------------------------------------

    @_in_turn
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, G, S, D]` keys and values; returns all of them as `[B, G, L, D]`, as a `DynamicCache` would.

        Columns that are not stored (padding) are zero.

        Raises:
            ValueError: the shapes do not fit the cache, or layers were called out of step.
            CacheFullError: the memory limit is reached.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, PagedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not self._open or self._batch is None:
            # Nobody announced the forward: a model that is not patched.
            return self.stock_layer(layer_idx).update(key_states, value_states, *args, **kwargs)
        past_keys, past_values = self._past(layer, key_states)
        k_pages, v_pages = self.pages_for(layer_idx, key_states.transpose(1, 2))
        slots = self._batch.slot_mapping(layer.window, key_states.device)
        with torch.no_grad():
            for pages, states in ((k_pages, key_states), (v_pages, value_states)):
                tokens = states.transpose(1, 2).flatten(0, 1)
                if self._new_stored is not None:
                    tokens = tokens[self._new_stored.flatten().to(tokens.device)]
                pages.flatten(0, 1).index_copy_(0, slots, tokens)
        return torch.cat((past_keys, key_states), 2), torch.cat((past_values, value_states), 2)

    def _past(self, layer: PagedLayer, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, L, D]` of the columns so far that a mask of Transformers covers."""
        columns = self._columns
        first = 0 if layer.window is None else max(columns - layer.window + 1, 0)
        if self.groups.group(layer.window).storage.pages(layer.index) is None or columns == first:
            # Columns without a token may have come before any page.
            empty = like.new_zeros(like.shape[0], like.shape[1], columns - first, like.shape[3])
            return empty, empty
        return self.read_columns(layer, first, columns, self.stored)

    def read_columns(self, layer: PagedLayer, first: int, last: int, stored: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, last - first, D]` of these columns, from pages; zero where none are stored."""
        held = self.groups.group(layer.window).storage.pages(layer.index)
        assert held is not None
        stored = None if stored is None else stored[:, :last]
        slots, missing = dense_slots(self.tables[layer.window], stored, first, last, held[0].device)
        return dense_tokens(held[0], slots, missing), dense_tokens(held[1], slots, missing)

    def dense_layer(self, layer: PagedLayer) -> tuple[Tensor, Tensor] | None:
        """Of what the layer has in pages, what Transformers would hold, dense; None before its first write."""
        held, columns = self.groups.group(layer.window).storage.pages(layer.index), self._columns
        if held is None or not self.lengths:
            return None
        first = 0 if layer.window is None else max(columns - layer.window + 1, 0)
        if layer.window is not None and self.record_past:
            first = max(self._past_from - layer.window + 1, 0)
        return self.read_columns(layer, first, columns, self.stored)

    def drop_pages(self) -> None:
        """Release all pages, whatever they hold; linear-attention layers keep their states."""
        self.hand_over(None)

    def hand_over(self, dense: DenseLayers | None) -> None:
        """Hold no page any more: what the cache holds is in `dense`, or nowhere."""
        held = {"dense": dense, "_known_stored": self.stored, "_loose": True}
        self.__dict__.update({**self._empty_state(), **held})
        self._fit_tables(keep_states=True)

    @_in_turn
    def hold_dense(self) -> None:
        """From now on, until `into_pages()`, Transformers' own layers hold the keys and values."""
        super().hold_dense()

    @_in_turn
    def into_pages(self, mask: Any, dtype: torch.dtype) -> str | None:
        """Bring what dense layers hold into pages; see `DenseCache`."""
        return super().into_pages(mask, dtype)

    def owns_all_pages(self, window: int | None) -> bool:
        """Whether no other cache holds a page of this window."""
        held = {page for pages in self.tables[window].rows for page in pages if page >= 0}
        return len(held) == self.groups.group(window).pool.in_use

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in the cache, padding included."""
        if self.dense is not None:
            return int(self.dense.or_first(layer_idx).get_seq_length())
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """`(kv length, kv offset)` of what `update()` will return for the layer."""
        if self.dense is not None:
            return self.dense.or_first(layer_idx).get_mask_sizes(query_length)
        layer = self.layers[layer_idx]
        window = (layer if isinstance(layer, PagedLayer) else self._paged[0]).window
        offset = 0 if window is None else max(self._columns - window + 1, 0)
        return self._columns - offset + query_length, offset

    @_in_turn
    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last `-tokens_to_remove` columns; a positive number is the length to keep, as in older releases.

        Raises:
            RuntimeError: pages behind a sliding window were released already, or a linear-attention layer has a state
                that cannot be taken back; call `activate_past_recording()` first.
        """
        self._settle()
        removed = int(tokens_to_remove)
        changes: dict[str, Any] = {"_snapshots": []}
        if self.dense is not None:
            self.dense.crop(removed)
        else:
            removed = -(max(self._columns - removed, 0) if removed > 0 else min(-removed, self._columns))
            changes["_past_from"] = self._columns + removed
            if removed:
                changes.update(self._cropped(self._columns + removed), _loose=True)
                self._check_croppable(changes["lengths"])
        self._snapshots = [(layer, layer.snapshot()) for layer in self._recurrent]
        for layer in self.layers:
            if not isinstance(layer, PagedLayer) and getattr(layer, "record_past", True):
                layer.crop(removed)
        self.__dict__.update(changes)
        if self._loose:
            self._fit_tables()
        self._release_behind()

    def _cropped(self, keep: int) -> dict[str, Any]:
        """What changes if the first `keep` columns are kept."""
        hidden = {index: hidden.crop(keep) for index, hidden in self.hidden.items()}
        if self._stored is None:
            lengths = [length - (self._columns - keep) for length in self.lengths]
            return {"lengths": lengths, "_columns": keep, "hidden": hidden}
        stored = self._stored_until(self._columns)
        gone = stored[:, keep:].sum(1).tolist()
        lengths = [length - count for length, count in zip(self.lengths, gone, strict=True)]
        return {"lengths": lengths, "_columns": keep, "_stored": stored[:, :keep], "hidden": hidden}

    def _check_croppable(self, lengths: list[int]) -> None:
        if self._recurrent and not self.record_past:
            raise RuntimeError(
                "crop() was called on a cache with linear-attention layers, whose states hold no past; prefill again, "
                "or call activate_past_recording() on the cache first"
            )
        for window, table in self.tables.items():
            released = not self.record_past and window is not None and self._columns >= window
            if released or table.misses_pages(lengths):
                raise RuntimeError(
                    f"crop() was called after the sliding window of {window} tokens was passed, and what lay before "
                    "it is released, at the latest by the crop() before; call activate_past_recording() before the "
                    "forward, and crop() once after it"
                )

    def activate_past_recording(self) -> None:
        """Release nothing behind a window until the next `crop()`."""
        if not self.record_past:
            self.record_past, self._past_from = True, self._columns
        for layer in self.dense.layers.values() if self.dense is not None else ():
            if layer.is_sliding:
                layer.activate_past_recording()
        super().activate_past_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` is: page tables move, pages are shared."""
        self.select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, sharing its pages."""
        self.select_rows([row for row in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (numbers or a bool mask)."""
        self.select_rows(torch.arange(self.batch_size, device="cpu")[indices.cpu()].tolist())

    @_in_turn
    def select_rows(self, rows: Sequence[int]) -> None:
        """Row b becomes a fork of row `rows[b]`, in place; any number of rows."""
        self._settle()
        if list(rows) == list(range(self.batch_size)):
            return
        if self.dense is not None:
            self.dense.select(torch.tensor(rows, device="cpu"))
            self._known_stored = None if self._known_stored is None else self._known_stored[list(rows)]
        elif not self.lengths:
            return
        else:
            for table in self.tables.values():
                table.trim(self.lengths)
            self._take_rows(rows)
            return
        for layer in self.layers:
            if not isinstance(layer, PagedLayer):
                layer.reorder_cache(torch.tensor(rows, device="cpu"))

    @_in_turn
    def reset(self) -> None:
        """Release all pages; the cache is as new."""
        self.groups.settle()
        self.__dict__.update({**self._empty_state(), "_loose": True})
        self._fit_tables()

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return len(self.lengths) or -1 if self.dense is None else self.dense.batch_size

    @property
    def max_cache_len(self) -> int:
        """-1: pages have no maximal length. PEFT asks every cache that is not a `DynamicCache`."""
        return -1

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A fork: shares the pages, copies what it writes to."""
        # Pages are shared where it is this thread's turn at them, and copied where another one is at work.
        return (self.groups.turn.take(PATIENCE), self._copied(memo, self.groups.turn.is_mine()))[1]

    def _copied(self, memo: dict[int, Any], share: bool) -> PagedCache:
        groups, tables = (self.groups, {}) if share else own_pages(self.groups, self.tables)
        if share:
            groups.settle()
        other = PagedCache(self._config, self._options, groups=groups, counters=self.counters, room=self.room)
        memo[id(self)] = other
        if share:
            for window, table in self.tables.items():
                table.fork_into(other.tables[window], self.lengths)
        else:
            other.tables.update(tables)
        layers = [
            copy.deepcopy(layer, memo) if not isinstance(layer, PagedLayer) else other.layers[index]
            for index, layer in enumerate(self.layers)
        ]
        other.__dict__.update(
            lengths=list(self.lengths), _columns=self._columns, _stored=self._stored, record_past=self.record_past,
            _past_from=self._past_from, dense=copy.deepcopy(self.dense, memo), _known_stored=self._known_stored,
            hidden=dict(self.hidden), layers=layers, _loose=True,
        )  # fmt: skip
        return other

    # ---- masks ------------------------------------------------------------------------------------------------

    @property
    def stored(self) -> Tensor | None:
        """`[B, columns]` bool on the host: columns whose token is stored; None if all are."""
        return None if self._stored is None else self._stored_until(self._columns)

    def _stored_until(self, columns: int) -> Tensor:
        held = torch.ones(len(self.lengths), 0, dtype=torch.bool, device="cpu") if self._stored is None else self._stored
        # All columns since then hold tokens.
        missing = max(columns - held.shape[1], 0)
        return torch.nn.functional.pad(held, (0, missing), value=True)[:, :columns]

    def _release_behind(self, margin: int = 0) -> None:
        for table in self.tables.values():
            table.release_behind([max(length - margin, 0) for length in self.lengths])
