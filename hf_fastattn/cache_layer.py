"""`PagedLayer`: one layer of a `PagedCache`, in the shape that Transformers asks about."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from hf_fastattn.cache import PagedCache


class PagedLayer(CacheLayerMixin):
    """A view on one layer of a paged cache; the cache does the work for all layers at once.

    Args:
        cache: the cache.
        index: the layer's index.
        window: keys a query sees, itself included; None for all.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: PagedCache, index: int, window: int | None) -> None:
        # No strong reference: a cycle would keep the pages until the garbage collector runs.
        self._cache = weakref.ref(cache)
        self.index = index
        self.window = window
        self.is_sliding = window is not None

    @property
    def cache(self) -> PagedCache:
        """The cache this layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise RuntimeError(f"the cache of layer {self.index} is gone; keep the PagedCache itself")
        return cache

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A dense copy of the keys, `[B, G, L, D]`."""
        dense = self.cache.dense_layer(self)
        return None if dense is None else dense[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A dense copy of the values, `[B, G, L, D]`."""
        dense = self.cache.dense_layer(self)
        return None if dense is None else dense[1]

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer holds anything."""
        return self.cache.get_seq_length() > 0

    @property
    def record_past(self) -> bool:
        """Whether nothing is released behind the window until the next crop."""
        return self.cache.record_past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: pages are made when they are first written."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to this layer; see `PagedCache.update`."""
        return self.cache.update(key_states, value_states, self.index, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(kv length, kv offset)` of what `update()` will return."""
        past = self.cache.get_seq_length()
        offset = 0 if self.window is None else max(past - self.window + 1, 0)
        return past - offset + query_length, offset

    def get_seq_length(self) -> int:
        """Columns in the cache, padding included."""
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        """The window, or -1: pages have no maximal length."""
        return -1 if self.window is None else self.window
