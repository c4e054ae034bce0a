"""`LentCache`: a user's `DynamicCache` whose keys and values live in pages for the length of a call."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from hf_fastattn.cache.dense_layers import DenseLayers
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.paged_layer import PagedLayer
from hf_fastattn.cache.recurrent_layer import stock_fields


class LentCache:
    """Stock updates the cache it is given in place: the user's object shows the paged cache meanwhile, and has it all after.

    Args:
        dynamic: the user's; `why_not_lent` has no objection to it.
        paged: new and empty; holds after `lend()` what `dynamic` holds, in the user's own layers until the first forward.
    """

    def __init__(self, dynamic: DynamicCache, paged: PagedCache) -> None:
        self.dynamic, self.paged = dynamic, paged

    def lend(self) -> None:
        """From now on the paged cache holds what the user's does."""
        dynamic, paged = self.dynamic, self.paged
        while len(dynamic.layers) < len(paged.layers):
            dynamic.layers.append(DynamicLayer())
        self._layers = dynamic.layers
        paged.filled(self._layers, None)
        attention = {i: layer for i, layer in enumerate(self._layers) if isinstance(paged.layers[i], PagedLayer)}
        paged.lent = DenseLayers(attention)
        dynamic.layers = paged.layers

    def give_back(self) -> None:
        """Let the user's layers hold what the paged cache holds, which is empty then. After that, nothing."""
        if self.paged.lent is None:
            return
        self.paged.hold_dense()
        self.paged.own_states()
        dense: Any = self.paged.dense
        for index, layer in enumerate(self._layers):
            held = dense[index] if isinstance(self.paged.layers[index], PagedLayer) else self.paged.layers[index]
            if held is not layer:
                vars(layer).update(stock_fields(held))
        self.dynamic.layers = self._layers
        self.paged.lent = None
        self.paged.reset()
