"""`WeightCopies`: 16-bit copies of fp32 weights, which decode steps under autocast read instead.

Autocast casts each weight whenever it is multiplied: it reads four bytes, writes two and reads them again. A call casts them
once. The copies are cast anew before each call, so that no change of the weights between calls, however it was made, is
missed. They take half the memory of the weights, and go when graphs are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shorter calls do not pay for the cast of every weight.
WORTH_COPYING = 8
# Share of the device's memory that stays free beside the copies.
SPARE = 0.05


class WeightCopies:
    """Copies of weights that autocast would cast.

    Args:
        weights: each once, contiguous.
        dtype: of the copies.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._weights = list(weights)
        with torch.inference_mode(False):
            self._copies = [torch.empty_like(weight, dtype=dtype) for weight in self._weights]
        self._by_id = {id(weight): copy for weight, copy in zip(self._weights, self._copies, strict=True)}

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies)

    def refresh(self) -> None:
        """Cast all weights, on the current stream."""
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self._copies, self._weights)

    def get(self, weight: Tensor) -> Tensor | None:
        """The copy of a weight; None if it has none."""
        return self._by_id.get(id(weight))

    @staticmethod
    def bytes_needed(weights: Sequence[Tensor], dtype: torch.dtype) -> int:
        """What the copies would take."""
        return sum(weight.numel() for weight in weights) * dtype.itemsize


def copies_fit(device: torch.device, needed: int, to_come: int) -> bool:
    """Whether the device has room for copies of `needed` bytes, and `to_come` bytes beside them."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return needed + to_come + SPARE * total <= free + unused
