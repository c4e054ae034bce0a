"""`WeightCopies`: 16-bit copies of a model's fp32 weights, which decode steps under autocast read instead.

Autocast casts each weight whenever it is multiplied: it reads four bytes, writes two and reads them again. A call casts them
once. The copies are cast anew before each call, so that no change of the weights between calls, however it was made, is
missed. They take half the memory of the weights, and go when graphs are dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.graphs.module_checks import submodules

# Shorter calls do not pay for the cast of every weight.
WORTH_COPYING = 8
# Share of the device's memory that stays free beside the copies.
SPARE = 0.05


class WeightCopies:
    """Copies of the weights of all linear layers that autocast would cast.

    Args:
        model: patched, with `lm_head`.
        dtype: of the copies.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._weights = _weights(model)
        with torch.inference_mode(False):
            self._copies = [torch.empty_like(weight, dtype=dtype) for weight in self._weights]
        self._by_id = {id(weight): copy for weight, copy in zip(self._weights, self._copies, strict=True)}

    def __len__(self) -> int:
        return len(self._copies)

    def refresh(self) -> None:
        """Cast all weights, on the current stream."""
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self._copies, self._weights)

    def get(self, weight: Tensor) -> Tensor | None:
        """The copy of a weight; None if it has none."""
        return self._by_id.get(id(weight))

    @staticmethod
    def bytes_needed(model: Any, dtype: torch.dtype) -> int:
        """What the copies would take."""
        return sum(weight.numel() for weight in _weights(model)) * dtype.itemsize


def _weights(model: Any) -> list[Tensor]:
    """fp32 weights of linear layers, each once."""
    found: dict[int, Tensor] = {}
    for module in (*submodules(model._fastattn.decoder(model)), model.lm_head):
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if type(weight) is nn.Parameter and weight.dtype is torch.float32 and weight.is_contiguous():
            found[id(weight)] = weight
    return list(found.values())


def copies_fit(model: Any, dtype: torch.dtype, to_come: int) -> bool:
    """Whether the device has room for the copies, and `to_come` bytes beside them."""
    device = model.device
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return WeightCopies.bytes_needed(model, dtype) + to_come + SPARE * total <= free + unused
