"""`DenseCache`: what a `PagedCache` holds outside of pages: Transformers' layers, copies, conversions and pickles."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.cache_state import CacheState, in_turn
from hf_fastattn.cache.conversion import read_layers, shown_columns, why_not_lent, write_pages, write_past
from hf_fastattn.cache.dense_layers import DenseLayers, fill_layer
from hf_fastattn.cache.paged_layer import PagedLayer
from hf_fastattn.cache.recurrent_layer import stock_fields
from hf_fastattn.cache.shown_states import ShownStates
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.pages.model_layout import template_layers

Made = TypeVar("Made", bound="DenseCache")


class DenseCache(CacheState):
    """The part of a `PagedCache` that is a `DynamicCache` to others; see there."""

    def states_of(self, layer: PagedLayer) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of a layer, wherever they are; what is written into them is the layer's from then on."""
        if self._moving is not None:
            # An exception came while layers were being filled.
            self._settle()
        if self.dense is not None:
            keys, values = self.dense[layer.index].keys, self.dense[layer.index].values
        else:
            is_new = self._open and layer.index in self._wrote
            shown, state = (self._shown_new, self._batch) if is_new else (self._shown, self.lengths)
            keys, values = shown.of(layer.index, state) or self._show(layer, shown, state, is_new) or (None, None)
        return self._replaced.get((layer.index, "keys"), keys), self._replaced.get((layer.index, "values"), values)

    def _show(self, layer: PagedLayer, shown: ShownStates, state: Any, is_new: bool) -> tuple[Tensor, Tensor] | None:
        # Writes to tensors that were made in inference mode are not counted.
        with torch.inference_mode(False), torch.no_grad():
            states = self._with_new(layer) if is_new else self.dense_layer(layer)
            if states is None:
                return None
            if layer.index in self.hidden:
                columns = self._columns + (self._query_length if is_new else 0)
                self.hidden[layer.index].put_back(columns - states[0].shape[2], *states)
            # Contiguous as Transformers' own, which may be viewed in another shape; one after the other, for less memory.
            made = [*states]
            del states
            given = made.pop(0).contiguous(), made.pop(0).contiguous()
            shown.keep(layer.index, state, given)
            return given

    def take_written(self) -> None:
        """What somebody has written into keys and values that he was shown is what the cache holds."""
        if self.dense is None and not self._open and self._shown.is_written(self.lengths):
            self.hold_dense()

    def pages_for(self, layer_idx: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """The K and V pages `[N, P, G, D]` that layer `layer_idx` writes `states [..., G, D]` to, its past as it is now."""
        self._take_past(layer_idx)
        return super().pages_for(layer_idx, states)

    def _take_past(self, layer_idx: int) -> None:
        """What somebody has written into a layer's past since the forward under way began is what the layer reads."""
        written = self._shown.take_written(layer_idx, self.lengths) if self._open and len(self._shown) else None
        if written is not None:
            write_past(self, layer_idx, written)

    def _with_new(self, layer: PagedLayer) -> tuple[Tensor, Tensor]:
        """What Transformers would hold of the layer, which has written its part of the forward under way."""
        columns, stored = self._columns + self._query_length, self.stored
        if self._new_stored is not None:
            stored = host_masks.beside(self._stored_until(self._columns), self._new_stored.cpu())
        elif stored is not None:
            stored = self._stored_until(columns)
        return self.read_columns(layer, self.first_held(layer.window, columns), columns, stored)

    def replace(self, index: int, name: str, states: Tensor | None) -> None:
        """Put `states` in the place of the `keys` or `values` of a layer."""
        if self._open:
            self._replaced[index, name] = states
            return
        setattr(self.stock_layer(index), name, states)

    @in_turn
    def hold_dense(self) -> None:
        """From now on, until `into_pages()`, Transformers' own layers hold the keys and values."""
        if self.dense is not None:
            return
        # After an interruption go on with the same layers: the pages already read may have been released.
        layers = self._moving = self._moving or self.lent or self._stock_layers()
        if self.lengths:
            read_layers(self, layers)
        self.hand_over(layers)

    def stock_layer(self, index: int) -> Any:
        """Transformers' own layer in the place of layer `index`."""
        self.hold_dense()
        assert self.dense is not None
        return self.dense[index]

    def place_of(self, layer: PagedLayer) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of a layer's keys; None before its first write."""
        storage = self.groups.group(layer.window).storage
        held = storage.pages(layer.index) if self.dense is None else None
        keys = held[0] if held is not None else None if self.dense is None else self.dense[layer.index].keys
        return (None, None) if keys is None else (keys.device, keys.dtype if held is None else storage.dtype)

    @in_turn
    def into_pages(self, mask: Any, dtype: torch.dtype) -> str | None:
        """Bring what dense layers hold into pages; returns why they stay, or None.

        Args:
            mask: of the next forward; columns that it hides are not stored.
            dtype: of the keys that the model will write.
        """
        self._settle()
        dense, known = self.dense, self._known_stored
        if dense is None:
            return None
        if not dense.is_empty:
            reason = dense.why_not_pages(dtype)
            if reason is not None:
                return reason
            stored = self.stored
            if stored is None:
                stored = shown_columns(mask, dense.batch_size, dense.columns)
            try:
                write_pages(self, dense, stored)
            except BaseException:
                self.__dict__.update(dense=dense, _known_stored=known)
                raise
        self.__dict__.update(dense=None, _known_stored=None)
        return None

    def _stock_layers(self) -> DenseLayers:
        templates = template_layers(self._config)
        layers = DenseLayers({layer.index: templates[layer.index] for layer in self._paged})
        if self.record_past:
            for template in layers.layers.values():
                if template.is_sliding:
                    template.record_past = True
        return layers

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and window of each layer, as a `DynamicCache` gives them."""
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    @classmethod
    def from_dynamic(
        cls: type[Made],
        cache: DynamicCache,
        config: Any,
        fastattn_config: FastAttnConfig | None = None,
        mask: Tensor | None = None,
    ) -> Made:
        """A cache that holds what a `DynamicCache` of the same model holds, which is left as it is.

        Args:
            cache: filled or empty; not offloaded or quantised.
            config: the model's configuration (`model.config`).
            fastattn_config: see the class.
            mask: `[B, columns]`, the columns that hold tokens; by default the mask of the next forward says so.

        Raises:
            TypeError: the cache is no `DynamicCache`.
            ValueError: it has layers that the model has not.
        """
        reason = why_not_lent(cache, config)
        if reason is not None:
            raise (ValueError if isinstance(cache, DynamicCache) else TypeError)(f"{reason}; give the model's DynamicCache")
        made = cls(config, fastattn_config)  # type: ignore[arg-type]
        return made.filled(copy.deepcopy(cache.layers), None if mask is None else mask.cpu().bool())

    def filled(self: Made, layers: Sequence[Any], stored: Tensor | None) -> Made:
        """This empty cache over layers of Transformers, which are its own from now on."""
        own = self._stock_layers()
        for index in range(min(len(layers), len(self.layers))):
            if isinstance(self.layers[index], PagedLayer):
                own.layers[index] = layers[index]
            else:
                vars(self.layers[index]).update(vars(layers[index]))
        self.record_past = any(getattr(layer, "record_past", False) for layer in layers)
        if not own.is_empty:
            self.dense, self._known_stored = own, stored
        return self

    def to_dynamic(self) -> DynamicCache:
        """A `DynamicCache` with copies of all keys, values and states, for a model of any kind; padding is zero in it."""
        made = DynamicCache(config=self._config)
        for index, template in enumerate(made.layers):
            made.layers[index] = self.copy_of(index, template)
        return made

    def copied_layer(self, layer: Any, memo: dict[int, Any]) -> Any:
        """A copy of a layer without keys, as it was before a forward that has not been committed."""
        self.own_states()
        copied = copy.deepcopy(layer, memo)
        for other, held in self._snapshots:
            if other is layer:
                copied.restore(copy.deepcopy(held, memo))
        return copied

    def copy_of(self, index: int, template: Any = None) -> Any:
        """A layer of Transformers with copies of what layer `index` holds; `template` is an empty one."""
        self.take_written()
        layer, made = self.layers[index], template or template_layers(self._config)[index]
        if not isinstance(layer, PagedLayer):
            vars(made).update(stock_fields(self.copied_layer(layer, {})))
        elif self.dense is not None:
            return copy.deepcopy(self.dense[index])
        else:
            states = self.dense_layer(layer)
            if states is not None:
                fill_layer(made, *states, self._columns, self.record_past)
        return made

    def __reduce__(self) -> Any:
        """Pickles as the layers that Transformers would have, so that loading needs neither the model nor its pages."""
        self.take_written()
        return restore_cache, (type(self), self._config, self._options, self.to_dynamic().layers, self.stored, self.room)


def restore_cache(
    kind: Any, config: Any, options: FastAttnConfig | None, layers: Sequence[Any], stored: Tensor | None, room: int
) -> Any:
    """The cache that was pickled with these parts."""
    return kind(config, options, room=room).filled(layers, stored)
