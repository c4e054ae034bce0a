"""`PagedCache`: a Transformers `Cache` whose keys and values live in pages."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.cache_state import PATIENCE, in_turn
from hf_fastattn.cache.forward_cache import ForwardCache
from hf_fastattn.cache.paged_layer import PagedLayer
from hf_fastattn.cache.recurrent_layer import RecurrentLayer
from hf_fastattn.cache.shown_states import ShownStates
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.counters import CallCounters
from hf_fastattn.kernels.page_formats import is_eight_bits, write_tokens
from hf_fastattn.pages.model_layout import cache_layout, is_pageable, is_recurrent, layer_window, template_layers
from hf_fastattn.pages.own_pages import own_pages
from hf_fastattn.pages.page_group import Holder
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.page_table import PageTable
from hf_fastattn.transformers_version import CACHE


class PagedCache(ForwardCache):
    """Keys and values of a batch of rows, in pages of a pool (Kwon et al., 2023, "PagedAttention").

    Only tokens that the attention mask shows are stored; `get_seq_length()` counts padding too, as Transformers
    expects. Rows share pages after `reorder_cache`, `batch_repeat_interleave` and `batch_select_indices`, and copy the
    last, partial one when they write. A patched model reads the pages in place. For any other model, and once somebody
    replaces or changes the keys of a layer, the cache holds Transformers' own dense layers (`dense`) and does what a
    `DynamicCache` does; the next forward of a patched model takes them into pages again, or runs on them where pages
    cannot hold them. Linear-attention layers keep their recurrent states as in Transformers.

    Args:
        config: the model's configuration (`model.config`).
        fastattn_config: page size and memory limit; ignored if `groups` is given. Without both, the cache has the
            options, and the pages, of the patched model that it is first given to.
        groups: pages to use, of a patched model; new ones by default.
        counters: where pages are counted.
        room: columns that the rows are expected to have in the end, so that their pages need not move.

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
        self._begin(template_layers(config), config, fastattn_config, groups, counters, room)

    @classmethod
    def of_layers(
        cls, templates: list[Any], config: Any, groups: PageGroups, counters: CallCounters, room: int
    ) -> PagedCache:
        """The same where the layers that Transformers' cache of this model has are known: making them takes long."""
        cache = cls.__new__(cls)
        cache._begin(templates, config, None, groups, counters, room)
        return cache

    def _begin(
        self,
        templates: list[Any],
        config: Any,
        fastattn_config: FastAttnConfig | None,
        groups: PageGroups | None,
        counters: CallCounters | None,
        room: int,
    ) -> None:
        self._config, self.templates = config, templates
        self._layout = cache_layout(config, templates)
        self._options = fastattn_config
        self.groups = groups or PageGroups(config, fastattn_config or FastAttnConfig())
        self.counters = counters or CallCounters()
        self.room, self.first = room, 0
        self.record_past = self.is_for_drafts = False
        # A user's own layers, which get their K/V back after a call, including tokens that pages leave out (`hidden`).
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

    @in_turn
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
            # No begin() came before: the model is not patched.
            return self.stock_layer(layer_idx).update(key_states, value_states, *args, **kwargs)
        self._take_past(layer_idx)
        past_keys, past_values = self._past(layer, key_states)
        k_pages, v_pages = self.pages_for(layer_idx, key_states.transpose(1, 2))
        slots = self._batch.on(key_states.device).slots[layer.window]
        with torch.no_grad():
            new = [states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states)]
            if self._new_stored is not None:
                new = [tokens[self._new_stored.flatten().to(tokens.device)] for tokens in new]
            if is_eight_bits(k_pages):
                write_tokens(k_pages, v_pages, slots, *new)
            else:
                for pages, tokens in zip((k_pages, v_pages), new, strict=True):
                    pages.flatten(0, 1).index_copy_(0, slots, tokens)
        return torch.cat((past_keys, key_states), 2), torch.cat((past_values, value_states), 2)

    def _past(self, layer: PagedLayer, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, L, D]` of the columns so far that a mask of Transformers covers."""
        columns = self._columns
        first = 0 if layer.window is None else max(columns - layer.window + 1, 0)
        if self.groups.group(layer.window).storage.pages(layer.index) is None or columns == first:
            # All columns so far may be padding, so that no page was made.
            empty = like.new_zeros(like.shape[0], like.shape[1], columns - first, like.shape[3])
            return empty, empty
        return self.read_columns(layer, first, columns, self.stored)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """`(kv length, kv offset)` of what `update()` will return for the layer."""
        if self.dense is not None:
            return self.dense.or_first(layer_idx).get_mask_sizes(query_length)
        layer = self.layers[layer_idx]
        window = (layer if isinstance(layer, PagedLayer) else self._paged[0]).window
        offset = 0 if window is None else max(self._columns - window + 1, 0)
        return self._columns - offset + query_length, offset

    @in_turn
    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last `-tokens_to_remove` columns; a positive number is the length to keep, as in older releases.

        Raises:
            RuntimeError: rows forget tokens (`FastAttnConfig.streaming`), pages behind a sliding window were released
                already, or a linear-attention layer has a state that cannot be taken back; call
                `activate_past_recording()` first.
        """
        self._settle()
        self.check_keeps_all("crop()")
        if self.dense is None and self.shown_states():
            # What Transformers keeps are views of the keys that somebody has.
            self.hold_dense()
        removed = int(tokens_to_remove)
        changes: dict[str, Any] = {"_snapshots": []}
        reach = min((layer.reach for layer in self.recurrent_layers.values()), default=0)
        if self.dense is not None:
            self._check_reach(-removed, reach)
            stored = self.stored
            self.dense.crop(removed)
            changes["_known_stored"] = None if stored is None else stored[:, : self.dense.columns]
        else:
            removed = -(max(self._columns - removed, 0) if removed > 0 else min(-removed, self._columns))
            changes["_past_from"] = self._columns + removed
            if removed:
                changes.update(self._cropped(self._columns + removed), _loose=True)
                self._check_reach(-removed, reach)
                self._check_croppable(changes["lengths"])
        self._snapshots = [(layer, layer.snapshot()) for layer in self.recurrent_layers.values()]
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                layer.crop(max(removed, -reach))
            elif not isinstance(layer, PagedLayer) and getattr(layer, "record_past", True):
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

    def _check_reach(self, removed: int, reach: int) -> None:
        if self._recurrent_places and removed > reach and not self.is_for_drafts:
            raise RuntimeError(
                f"crop() was called to remove {removed} tokens from a cache with linear-attention layers, whose states "
                f"reach back by {reach}; prefill again, or call activate_past_recording() on the cache before the forward"
            )

    def _check_croppable(self, lengths: list[int]) -> None:
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

    @in_turn
    def select_rows(self, rows: Sequence[int]) -> None:
        """Row b becomes a fork of row `rows[b]`, in place; any number of rows."""
        self._settle()
        self.take_written()
        # What somebody was shown is nobody's behind a selection, for which Transformers copies: also one of all rows.
        self._shown = ShownStates()
        if self.dense is None and list(rows) == list(range(self.batch_size)):
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

    @in_turn
    def reset(self) -> None:
        """Release all pages; the cache is as new."""
        self.groups.settle()
        self.__dict__.update({**self._empty_state(), "_loose": True})
        self._fit_tables()

    @property
    def is_initialized(self) -> bool:
        """Whether every layer with keys and values holds some."""
        return all(layer.is_initialized for layer in self._paged)

    @property
    def max_cache_len(self) -> int:
        """-1: pages have no maximal length. PEFT asks every cache that is not a `DynamicCache`."""
        return -1

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        """A fork: shares the pages, copies what it writes to."""
        self.take_written()
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
            other.layers[index] if isinstance(layer, PagedLayer) else self.copied_layer(layer, memo)
            for index, layer in enumerate(self.layers)
        ]
        other.__dict__.update(
            lengths=list(self.lengths), _columns=self._columns, _stored=self._stored, record_past=self.record_past,
            is_for_drafts=self.is_for_drafts, _past_from=self._past_from, dense=copy.deepcopy(self.dense, memo),
            _known_stored=self._known_stored, hidden=dict(self.hidden), layers=layers, _loose=True,
        )  # fmt: skip
        return other
