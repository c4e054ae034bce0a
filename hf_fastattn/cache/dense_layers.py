"""`DenseLayers`: the attention layers of a cache as Transformers holds them, a tensor of keys and one of values each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer


class DenseLayers:
    """Transformers' own layers by index. What is done to them is done by their own methods, so it is what stock does.

    Args:
        layers: `DynamicLayer`s and `DynamicSlidingWindowLayer`s; they are changed in place.
    """

    def __init__(self, layers: Mapping[int, Any]) -> None:
        self.layers = dict(layers)

    def __getitem__(self, index: int) -> Any:
        return self.layers[index]

    def or_first(self, index: int) -> Any:
        """The layer `index`, or the first one if that is no attention layer."""
        return self.layers.get(index) or next(iter(self.layers.values()))

    def crop(self, tokens: int) -> None:
        """Crop every layer."""
        for layer in self.layers.values():
            layer.crop(tokens)

    def select(self, rows: Tensor) -> None:
        """Row b of every layer becomes what row `rows[b]` is."""
        for layer in self.layers.values():
            layer.reorder_cache(rows)

    @property
    def is_empty(self) -> bool:
        """Nothing was stored yet."""
        return all(layer.keys is None or layer.keys.numel() == 0 for layer in self.layers.values())

    @property
    def batch_size(self) -> int:
        """Rows; -1 while nothing is stored."""
        keys = next((layer.keys for layer in self.layers.values() if layer.keys is not None), None)
        return -1 if keys is None else keys.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the first layer, padding included."""
        return int(next(iter(self.layers.values())).get_seq_length())

    def columns_held(self, window: int | None) -> int:
        """Columns whose keys are still there, in layers of this window."""
        return next(int(layer.keys.shape[2]) for layer in self.layers.values() if window_of(layer) == window)

    def why_not_pages(self, dtype: torch.dtype) -> str | None:
        """Why pages cannot hold what the layers hold, for a model that writes keys of `dtype`; None if they can."""
        if any(layer.keys is None or layer.values is None for layer in self.layers.values()):
            return "some layers of the cache are empty"
        if any(layer.keys.ndim != 4 or layer.keys.shape != layer.values.shape for layer in self.layers.values()):
            return "keys and values in the cache are of different shapes"
        if len({layer.get_seq_length() for layer in self.layers.values()}) > 1:
            return "the layers of the cache hold different numbers of tokens"
        tensors = [tensor for layer in self.layers.values() for tensor in (layer.keys, layer.values)]
        if len({tensor.shape[0] for tensor in tensors}) > 1:
            return "the layers of the cache hold different numbers of rows"
        others = {tensor.dtype for tensor in tensors} - {dtype}
        if others:
            return f"the cache holds {', '.join(map(str, others))}, and the model writes {dtype}"
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "gradients of cached keys are needed"
        return self._why_not_windows()

    def _why_not_windows(self) -> str | None:
        held: dict[int | None, int] = {}
        for layer in self.layers.values():
            window, length = window_of(layer), layer.keys.shape[2]
            least = self.columns if window is None else min(self.columns, window - 1)
            if length < least or length > self.columns or held.setdefault(window, length) != length:
                return "a layer with a sliding window holds another number of tokens than it has seen"
        return None


def window_of(layer: Any) -> int | None:
    """The window of a layer of Transformers; None if it sees all keys."""
    return int(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else None


def fill_layer(layer: Any, keys: Tensor, values: Tensor, columns: int, record_past: bool) -> None:
    """Make a layer of Transformers hold `[B, G, held, D]` keys and values, the last of `columns` that it has seen."""
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length, layer.record_past = columns, record_past
