"""`PagePlaces`: where the page tensors of a cache lie, for a kernel that copies pages of all layers in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache


class PagePlaces:
    """Addresses of the K and V pages of every layer, in a tensor that stays where it is.

    Args:
        cache: that holds a prompt, so that every layer has pages.
        tensor: `[2 * layers, 3]` int64, as `ForkTensors.places`.
    """

    def __init__(self, cache: PagedCache, tensor: Tensor) -> None:
        self._cache, self.tensor = cache, tensor
        # Of an earlier call: nobody knows where pages lay then.
        self._version = -1

    def pages(self) -> list[tuple[int, Tensor]]:
        """Index of the window, and the pages `[N, P, G, D]`: K and V of every layer."""
        found, windows = [], list(self._cache.tables)
        for layer in self._cache.paged_layers:
            held = self._cache.groups.group(layer.window).storage.pages(layer.index)
            assert held is not None
            found += [(windows.index(layer.window), pages) for pages in held]
        return found

    def write(self) -> None:
        """Write the addresses if tensors have moved."""
        version = self._cache.groups.storage_version
        if version == self._version:
            return
        rows = [(pages.data_ptr(), pages[0].nbytes // 8, window) for window, pages in self.pages()]
        self.tensor.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu"), non_blocking=True)
        self._version = version
