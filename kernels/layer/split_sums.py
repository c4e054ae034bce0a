"""Split-K: `SplitSums`, the device memory of a product beside its inputs and outputs, and what its programs do with it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
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
        self._arrived: Tensor | None = None
        self._partial: dict[int, Tensor] = {}

    @property
    def arrived(self) -> Tensor:
        """`[MOST_TILES]` int32 counters, made when they are first asked for: many forwards split nothing."""
        if self._arrived is None:
            # Tensors made in inference mode could not be written outside of it later.
            with torch.inference_mode(False):
                self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=self.device)
        return self._arrived

    def partial(self, elements: int) -> Tensor:
        """Room for that many fp32 elements; kept, since a captured graph holds its address."""
        if elements not in self._partial:
            with torch.inference_mode(False):
                self._partial[elements] = torch.empty(elements, dtype=torch.float32, device=self.device)
        return self._partial[elements]


@triton.jit
def leave_part(
    acc, acc_u, cell, number, part, partial_ptr, arrived_ptr, SIZE: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """Leave a part's sums, of two weights if GATED, for tile `number`; whether it is the last of SPLIT to arrive.

    `cell` are the places of the sums among SIZE.
    """
    SUMS: tl.constexpr = 2 if GATED else 1
    parts = partial_ptr + number.to(tl.int64) * (SPLIT * SUMS * SIZE)
    tl.store(parts + part * (SUMS * SIZE) + cell, acc)
    if GATED:
        tl.store(parts + part * (SUMS * SIZE) + SIZE + cell, acc_u)
    # Every thread has stored its share of the part before one of them counts it.
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr + number, 1, sem="acq_rel", scope="gpu") == SPLIT - 1


@triton.jit
def sum_parts(
    cell, number, partial_ptr, arrived_ptr, SIZE: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """The sums of all parts of a tile, by the last one, which has the counter at zero again: of w0, and of w1 if GATED."""
    SUMS: tl.constexpr = 2 if GATED else 1
    parts = partial_ptr + number.to(tl.int64) * (SPLIT * SUMS * SIZE)
    tl.store(arrived_ptr + number, 0)
    total = tl.zeros(cell.shape, tl.float32)
    total_u = total
    for other in tl.static_range(SPLIT):
        # .cg bypasses the L1 cache, which may hold values from before another program wrote.
        total += tl.load(parts + other * (SUMS * SIZE) + cell, cache_modifier=".cg")
        if GATED:
            total_u += tl.load(parts + other * (SUMS * SIZE) + SIZE + cell, cache_modifier=".cg")
    return total, total_u
