"""`Workspace`: the device memory that split-KV attention needs beside its inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

# The most programs that split-KV launches a multiprocessor.
MAX_PROGRAMS = 2
# Where there is no GPU: the interpreter runs programs one after the other.
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
        # A tensor made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            self.arrived = torch.zeros(MAX_PROGRAMS * self.processors, dtype=torch.int32, device=device)
        self._partial: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def split_kv(self, block_m: int, block_d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for two states of each program, `[block_m, block_d]` and the maximum and sum of each row; the counters."""
        key = (block_m, block_d)
        if key not in self._partial:
            with torch.inference_mode(False):
                rows = 2 * MAX_PROGRAMS * self.processors * block_m
                partial = torch.empty(rows, block_d, dtype=torch.float32, device=self.device)
                self._partial[key] = (partial, torch.empty(rows, 2, dtype=torch.float32, device=self.device))
        return *self._partial[key], self.arrived
