"""`SplitSums`: the device memory that a split-K product needs beside its inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

# The most tiles of weight rows that a split-K launch may have: more of them fill the GPU without a split.
MOST_TILES = 1024


class SplitSums:
    """Partial sums and arrival counters, for the launches of one stream.

    The counters are zero between launches: the last program to arrive resets them, so a captured graph can be replayed.
    Two launches that may run at the same time need two of these.

    Args:
        device: where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Tensors made in inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            self.arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
        self._partial: dict[int, Tensor] = {}

    def partial(self, elements: int) -> Tensor:
        """Room for that many fp32 elements; kept, since a captured graph holds its address."""
        if elements not in self._partial:
            with torch.inference_mode(False):
                self._partial[elements] = torch.empty(elements, dtype=torch.float32, device=self.device)
        return self._partial[elements]
