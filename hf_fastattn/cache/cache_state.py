"""`CacheState`: what a paged cache holds, field by field, and how it is read, exchanged and emptied."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.crossing import Crossing
from hf_fastattn.cache.dense_layers import DenseLayers
from hf_fastattn.cache.dense_tokens import dense_eight_bits, dense_slots, dense_tokens
from hf_fastattn.cache.forward_states import ForwardStates
from hf_fastattn.cache.hidden_columns import Hidden
from hf_fastattn.cache.known_mask import KnownMask
from hf_fastattn.cache.padding import Padding
from hf_fastattn.cache.paged_layer import PagedLayer
from hf_fastattn.cache.recurrent_layer import RecurrentLayer, own_states
from hf_fastattn.cache.row_states import RowStates
from hf_fastattn.cache.shown_states import ShownStates
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.counters import CallCounters
from hf_fastattn.kernels.page_formats import is_eight_bits
from hf_fastattn.pages.own_pages import own_pages
from hf_fastattn.pages.page_group import Holder
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.page_table import PageTable
from hf_fastattn.pages.reach import tokens_ahead
from hf_fastattn.pages.spans import Token
from hf_fastattn.stream_layout import StreamLayout

# Seconds that a thread waits for another one that works with the same pages before it goes on with pages of its own.
PATIENCE = 0.05

Held = TypeVar("Held", bound="CacheState")
Params = ParamSpec("Params")
Result = TypeVar("Result")


def in_turn(change: Callable[Concatenate[Held, Params], Result]) -> Callable[Concatenate[Held, Params], Result]:
    """The method runs while no other thread changes the same pages."""

    @functools.wraps(change)
    def taken(self: Held, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        if self.groups.turn.is_mine():
            return change(self, *args, **kwargs)
        return (self.take_turn(), change(self, *args, **kwargs))[1]

    return taken


class CacheState(Cache):
    """The fields of a `PagedCache`, and what needs nothing but them.

    What belongs together changes in one step, `self.__dict__.update(...)`: an exception, Ctrl-C included, may come between
    any two statements. What it leaves half done, `_settle()` takes back before anything else is done with the cache.

    Attributes:
        groups: the model's page groups; `tables` are the rows' page tables in them, by window.
        lengths: tokens stored of each row; empty before the first forward.
        known_mask: the mask of the last forward, so that the next one compares only what is new.
        padding: of the forward under way, for models whose layers keep the padded layout.
        counters: where pages are counted.
        room: columns that the rows are expected to have in the end; see `tokens_ahead`.
        first: columns that pages are made for at once.
        record_past: nothing is released behind a window until the next `crop()`.
        is_for_drafts: an assistant's; where states cannot be taken back, its next draft is worse, and nothing else.
        dense: Transformers' layers, if they and not pages hold the keys and values.
        lent: a user's layers, which get their keys back after a call.
        templates: the layers that Transformers' cache of the model has.
        hidden: by layer, tokens that a mask hides and pages leave out.
    """

    groups: PageGroups
    tables: dict[int | None, PageTable]
    lengths: list[int]
    known_mask: KnownMask
    padding: Padding | None
    counters: CallCounters
    room: int
    first: int
    record_past: bool
    is_for_drafts: bool
    dense: DenseLayers | None
    lent: DenseLayers | None
    hidden: dict[int, Hidden]
    templates: list[Any]
    hold_dense: Callable[[], None]
    _settle: Callable[[], None]
    _config: Any
    _layout: tuple[Any, ...]
    _options: FastAttnConfig | None
    _paged: list[PagedLayer]
    _recurrent_places: list[int]
    _holder: Holder
    # Columns in the cache, padding included.
    _columns: int
    # `[B, n]` bool, which of the first n columns hold tokens; all later ones do. None if all columns do.
    _stored: Tensor | None
    _batch: Batch | None
    _snapshots: list[tuple[RecurrentLayer, dict[str, Any]]]
    _new_stored: Tensor | None
    _query_length: int
    _dense: bool
    _open: bool
    _created_rows: bool
    # Tables may hold more than `lengths` tells.
    _loose: bool
    # What layers read and write instead of the forward under way.
    _using: Batch | None
    # Where those steps have the states of linear-attention layers, if not in the layers.
    _row_states: RowStates | ForwardStates | None
    # How those steps go on from device to device, if layers are on several.
    _crossing: Crossing | None
    # The rows have got pages ahead since the prompt, or since there are more of them.
    _reserved_ahead: bool
    # Memory was short: no page is made before it is needed.
    _is_frugal: bool
    # Columns that dense layers are known to hold tokens in.
    _known_stored: Tensor | None
    # Where `record_past` began: of the columns before it, only those inside a window are still held.
    _past_from: int
    # Layers that the forward under way has written to.
    _wrote: set[int]
    # Keys or values set on a layer while a forward is under way; they take effect when it is committed.
    _replaced: dict[tuple[int, str], Tensor | None]
    # What somebody was shown of the pages, and of what a layer holds once it has written in the forward under way.
    _shown: ShownStates
    _shown_new: ShownStates
    # Dense layers that keys are being moved into.
    _moving: DenseLayers | None

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
        self.own_states()
        return self.groups.turn.take(PATIENCE)

    def _live_in(self, groups: PageGroups, tables: dict[int | None, PageTable]) -> None:
        """Hold what `tables` of `groups` hold, and nothing of the groups so far."""
        before_groups, before, holder = self.groups, self._holder, groups.enlist(self, tables)
        before.tables = self.tables
        self.__dict__.update(groups=groups, tables=tables, _holder=holder, _reserved_ahead=False)
        before_groups.discharge(before)

    def _empty_state(self) -> dict[str, Any]:
        return {
            "lengths": [], "_columns": 0, "_stored": None, "known_mask": KnownMask(), "_query_length": 0, "_dense": False,
            "_reserved_ahead": False, "dense": None, "hidden": {}, "_known_stored": None, "_past_from": 0, "_moving": None,
            "_is_frugal": False, "_shown": ShownStates(), "_shown_new": ShownStates(), **self._closed(),
        }  # fmt: skip

    @staticmethod
    def _closed() -> dict[str, Any]:
        """The state without a forward under way."""
        return {
            "_open": False, "_batch": None, "_new_stored": None, "padding": None, "_snapshots": [], "_wrote": set(),
            "_replaced": {}, "_created_rows": False, "_loose": False, "_using": None,
            "_row_states": None, "_crossing": None,
        }  # fmt: skip

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

    def hand_over(self, dense: DenseLayers | None) -> None:
        """Hold no page any more: what the cache holds is in `dense`, or nowhere."""
        held = {"dense": dense, "_known_stored": self.stored, "_loose": True}
        self.__dict__.update({**self._empty_state(), **held})
        self._fit_tables(keep_states=True)

    def drop_pages(self) -> None:
        """Release all pages, whatever they hold; linear-attention layers keep their states."""
        self.hand_over(None)

    def exchange_tables(self, tables: dict[int | None, PageTable], changes: dict[str, Any]) -> None:
        """Hold what `tables` hold instead, in one step with other `changes`; their pools are unsettled until then."""
        before = self.tables
        self.__dict__.update({**changes, "tables": tables})
        self._holder.tables = tables
        for table in before.values():
            table.clear()
        for table in tables.values():
            table.pool.unsettled = False

    def note_pages(self, lengths: list[int], columns: int, stored: Tensor | None, least_held: int) -> None:
        """Pages hold `lengths[b]` tokens of `columns` columns, and behind every window those from `least_held` on."""
        windows = [window for window in self.tables if window is not None]
        self.__dict__.update(
            lengths=lengths, _columns=columns, _stored=stored, _past_from=least_held + min(windows, default=1) - 1,
            dense=None, _known_stored=None,
        )  # fmt: skip

    def ahead_of(self, columns: int) -> int:
        """Tokens beyond `columns` that rows get pages for where pages have to be made."""
        return 0 if self._is_frugal else tokens_ahead(columns, self.room, self.first, not self._columns)

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """The layers with keys and values."""
        return self._paged

    @property
    def recurrent_layers(self) -> dict[int, RecurrentLayer]:
        """The layers with the state of a linear attention, by index."""
        return {place: self.layers[place] for place in self._recurrent_places}

    @property
    def has_states(self) -> bool:
        """Whether all linear-attention layers hold the states of their rows."""
        return all(layer.recurrent_states[0] is not None for layer in self.recurrent_layers.values())

    @property
    def stores_eight_bits(self) -> bool:
        """Whether a layer's keys and values are stored in 8 bits."""
        return bool(self.groups.formats)

    @property
    def records_states(self) -> bool:
        """Whether linear-attention layers are to keep the states before their last tokens."""
        return any(layer.record_past for layer in self.recurrent_layers.values())

    def own_states(self) -> None:
        """No state of a layer lies where recorded forwards may write."""
        for layer in self.recurrent_layers.values():
            own_states(layer.__dict__)
        for _, held in self._snapshots:
            own_states(held)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return len(self.lengths) or -1 if self.dense is None else self.dense.batch_size

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in the cache, padding included, and those that the layer has written in the forward under way."""
        if self.dense is not None:
            return int(self.dense.or_first(layer_idx).get_seq_length())
        # Layer 0, if it has no keys, stands for the first that has some.
        is_ahead = self._open and (layer_idx or self._paged[0].index) in self._wrote
        return self._columns + (self._query_length if is_ahead else 0)

    @property
    def past_columns(self) -> int:
        """Columns before the forward under way, padding included."""
        return self._columns

    @property
    def stored(self) -> Tensor | None:
        """`[B, columns]` bool on the host: columns whose token is stored; None if all are, or dense layers hold others."""
        if self.dense is not None:
            known = self._known_stored
            return None if known is None or known.shape != (self.dense.batch_size, self.dense.columns) else known
        return None if self._stored is None else self._stored_until(self._columns)

    def _stored_until(self, columns: int) -> Tensor:
        held = torch.ones(len(self.lengths), 0, dtype=torch.bool, device="cpu") if self._stored is None else self._stored
        # All columns since then hold tokens.
        return host_masks.longer(held, max(columns - held.shape[1], 0), True)[:, :columns]

    @property
    def stream(self) -> StreamLayout | None:
        """Which tokens rows keep, if they do not keep all."""
        return self.groups.stream

    def check_keeps_all(self, wanted: str) -> None:
        """Raise a `RuntimeError` if rows forget tokens, which `wanted` needs."""
        if self.stream is not None:
            raise RuntimeError(
                f"{wanted} needs all tokens of a row, but with {self.groups.streaming} a row keeps its first and last ones; "
                "patch the model without streaming"
            )

    def pages_for(self, layer_idx: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """The K and V pages `[N, P, G, D]` that layer `layer_idx` writes `states [..., G, D]` to."""
        self._wrote.add(layer_idx)
        return self.pages_of(layer_idx, states)

    def pages_of(self, layer_idx: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """The same pages, for states that are not written."""
        window = self.layers[layer_idx].window
        group = self.groups.group(window)

        def is_alone() -> bool:
            return self._columns == 0 and self.tables[window].held == group.pool.in_use

        return group.storage.layer(layer_idx, states, group.pool.capacity, is_alone)

    def owns_all_pages(self, window: int | None) -> bool:
        """Whether nobody else holds a page of this window: no other cache, no fork of this one, no kept prompt."""
        pool = self.groups.group(window).pool
        held = Counter(page for pages in self.tables[window].rows for page in pages if page >= 0)
        return len(held) == pool.in_use and all(pool.owners(page) == count for page, count in held.items())

    def read_columns(self, layer: PagedLayer, first: int, last: int, stored: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, last - first, D]` of these columns, from pages; zero where none are stored.

        Raises:
            RuntimeError: rows forget tokens.
        """
        self.check_keeps_all("reading keys and values from the cache")
        held = self.groups.group(layer.window).storage.pages(layer.index)
        assert held is not None
        stored = None if stored is None else stored[:, :last]
        slots, missing = dense_slots(self.tables[layer.window], stored, first, last, held[0].device)
        if is_eight_bits(held[0]):
            return dense_eight_bits(held, slots, missing, self.groups.group(layer.window).storage.dtype or torch.float32)
        return dense_tokens(held[0], slots, missing), dense_tokens(held[1], slots, missing)

    def shown_states(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, keys and values that somebody was shown, and has still or has written into."""
        return self._shown.now(self.lengths)

    def dense_layer(self, layer: PagedLayer) -> tuple[Tensor, Tensor] | None:
        """Of what the layer has in pages, what Transformers would hold, dense; None before its first write."""
        held, columns = self.groups.group(layer.window).storage.pages(layer.index), self._columns
        if held is None or not self.lengths:
            return None
        return self.read_columns(layer, self.first_held(layer.window, columns), columns, self.stored)

    def first_held(self, window: int | None, columns: int) -> int:
        """The first of so many columns that a layer of Transformers with this window still holds."""
        if window is None:
            return 0
        return max((self._past_from if self.record_past else columns) - window + 1, 0)
