"""`PagedLayer`: one layer of a `PagedCache`, in the shape that Transformers asks about."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class Owner(Protocol):
    """What a layer asks of the cache that it belongs to."""

    record_past: bool

    def states_of(self, layer: Any) -> tuple[Tensor | None, Tensor | None]: ...
    def replace(self, index: int, name: str, states: Tensor | None) -> None: ...
    def place_of(self, layer: Any) -> tuple[torch.device | None, torch.dtype | None]: ...
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]: ...
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]: ...
    def get_seq_length(self, layer_idx: int = 0) -> int: ...
    def stock_layer(self, index: int) -> Any: ...
    def copy_of(self, index: int) -> Any: ...


class PagedLayer(CacheLayerMixin):
    """A view on one layer of a paged cache; the cache does the work for all layers at once.

    What is done to a single layer (its keys replaced, cropped, reordered) is done to a layer of Transformers' own, which
    the cache goes over to, and comes back from if all its layers agree again.

    Args:
        cache: the cache.
        index: the layer's index.
        window: keys a query sees, itself included; None for all.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: Owner, index: int, window: int | None) -> None:
        # No strong reference: a cycle would keep the pages until the garbage collector runs.
        self._cache = weakref.ref(cache)
        self.index = index
        self.window = window
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window
            self._sliding_window_tensor = torch.tensor(window, dtype=torch.long)

    @property
    def cache(self) -> Owner:
        """The cache this layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise RuntimeError(f"the cache of layer {self.index} is gone; keep the PagedCache itself")
        return cache

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The keys, `[B, G, L, D]`; from pages, a copy. What is set in their place, or written into them, is the layer's."""
        return self.cache.states_of(self)[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self.cache.replace(self.index, "keys", keys)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The values, likewise."""
        return self.cache.states_of(self)[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self.cache.replace(self.index, "values", values)

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer holds anything."""
        return self.get_seq_length() > 0

    @property
    def record_past(self) -> bool:
        """Whether nothing is released behind the window until the next crop."""
        return self.cache.record_past

    @property
    def cumulative_length(self) -> int:
        """Columns that the layer has seen, padding included."""
        return self.get_seq_length()

    @property
    def device(self) -> torch.device | None:
        """Where the keys are."""
        return self.cache.place_of(self)[0]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the keys."""
        return self.cache.place_of(self)[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: pages are made when they are first written."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to this layer; see `PagedCache.update`."""
        return self.cache.update(key_states, value_states, self.index, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(kv length, kv offset)` of what `update()` will return."""
        return self.cache.get_mask_sizes(query_length, self.index)

    def get_seq_length(self) -> int:
        """Columns in the layer, padding included, and those that it has written in the forward under way."""
        return self.cache.get_seq_length(self.index)

    def get_max_length(self) -> int:
        """The window, or -1: pages have no maximal length."""
        return -1 if self.window is None else self.window

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last columns of this layer alone."""
        self._stock_layer().crop(int(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of this layer alone."""
        self._stock_layer().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the rows of this layer alone."""
        self._stock_layer().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of this layer alone."""
        self._stock_layer().batch_select_indices(indices)

    def reset(self) -> None:
        """Forget what this layer holds."""
        self._stock_layer().reset()

    def _stock_layer(self) -> Any:
        return self.cache.stock_layer(self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A layer of Transformers with the same content: a copy is no view on this cache."""
        return self.cache.copy_of(self.index)

    def __reduce__(self) -> Any:
        """Pickles as a layer of Transformers."""
        return _itself, (self.cache.copy_of(self.index),)


def _itself(layer: Any) -> Any:
    return layer
