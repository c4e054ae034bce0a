"""`Workspace`: the device memory that split-KV attention needs beside its inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import power_of_2

# Without a GPU, where the interpreter runs programs one after the other: a small number that still splits items.
INTERPRETED_PROCESSORS = 3


class Workspace:
    """Partial attention states and arrival counters, for the launches of one stream.

    The counters are zero between launches: the last program to arrive resets them, so a captured graph can be replayed.
    Two launches that may run at the same time need two workspaces.

    Args:
        device: where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.processors = INTERPRETED_PROCESSORS
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._counters = self._zeros(0)
        self._partial: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._outgrown: list[Tensor] = []

    def split_kv(self, parts: int, block_m: int, block_d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for `parts` states `[block_m, block_d]`, for the maximum and sum of their rows, and a counter for each.

        Buffers grow by powers of two; the smaller ones are kept alive, since a captured graph may still write to them.
        """
        parts = power_of_2(parts)
        if self._counters.shape[0] < parts:
            self._outgrown.append(self._counters)
            self._counters = self._zeros(parts)
        key = (block_m, block_d)
        if key not in self._partial or self._partial[key][0].shape[0] < parts * block_m:
            self._outgrown.extend(self._partial.pop(key, ()))
            # Tensors made in inference mode could not be written outside of it later.
            with torch.inference_mode(False):
                partial = torch.empty(parts * block_m, block_d, dtype=torch.float32, device=self.device)
                sums = torch.empty(parts * block_m, 2, dtype=torch.float32, device=self.device)
            self._partial[key] = (partial, sums)
        return *self._partial[key], self._counters

    def _zeros(self, count: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(count, dtype=torch.int32, device=self.device)
