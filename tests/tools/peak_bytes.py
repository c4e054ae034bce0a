"""The most bytes of tensors that exist at any time while something runs, as the allocator of a GPU would count them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes(TorchDispatchMode):
    """Counts storages that operations inside have made; what was there before is left out.

    Attributes:
        now: bytes that exist.
        most: of them at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}
        self._views: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, before)
        return result

    def _note(self, tensor: torch.Tensor, before: set[int]) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if place not in self._sizes:
            if place in before or not size:
                return
            self._sizes[place], self._views[place] = size, 0
            self.now += size
            self.most = max(self.most, self.now)
        self._views[place] += 1
        weakref.finalize(tensor, self._gone, place)

    def _gone(self, place: int) -> None:
        self._views[place] -= 1
        if not self._views[place]:
            self.now -= self._sizes.pop(place)
            del self._views[place]
