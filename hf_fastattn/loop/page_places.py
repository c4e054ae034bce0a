"""`PagePlaces`: where the page tensors of a cache lie, for a kernel that copies pages of all layers in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.pages.page_storage import copied_with


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
        """Index of the window, and what is copied page by page `[N, ...]`, of K and of V of every layer.

        With 8 bits that is one tensor for both.
        """
        found, windows = [], list(self._cache.tables)
        for layer in self._cache.paged_layers:
            held = self._cache.groups.group(layer.window).storage.pages(layer.index)
            assert held is not None
            copied = copied_with(held)
            # As many for each layer whatever its pages hold: of a tensor for both, and one without words.
            copied = copied if len(copied) == len(held) else (*copied, copied[0][:, :0])
            found += [(windows.index(layer.window), pages) for pages in copied]
        return found

    def write(self) -> None:
        """Write the addresses if tensors have moved."""
        version = self._cache.groups.storage_version
        if version == self._version:
            return
        rows = [(pages.data_ptr(), pages[0].nbytes // 8, window) for window, pages in self.pages()]
        self.tensor.copy_(torch.tensor(rows, dtype=torch.int64, device="cpu"), non_blocking=True)
        self._version = version
