"""`Readback`: what steps have chosen, on its way to the host, read some steps late so that neither waits for the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.kernels.sampling.loop_tensors import FINISHED_BIT

# How many steps late the host reads: with one running and one queued the device never waits for it.
DEPTH = 2


@dataclass(frozen=True)
class StepTokens:
    """What one step chose.

    Attributes:
        tokens: `[rows]` int64.
        finished: `[rows]` bool, rows that have finished with it or before.
        numbers: which row of the call each is.
    """

    tokens: NDArray[np.int64]
    finished: NDArray[np.bool_]
    numbers: Sequence[int]


class Readback:
    """A ring of host buffers, pinned for a CUDA device.

    Args:
        rows: most rows of a step.
        device: where they come from.
        depth: how many steps may be under way when another one is sent.
    """

    def __init__(self, rows: int, device: torch.device, depth: int = DEPTH) -> None:
        cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self._host = torch.zeros(depth + 1, rows, dtype=torch.int64, device="cpu", pin_memory=cuda)
        self._device, self._depth = device, depth
        self._events = [torch.cuda.Event() for _ in range(depth + 1)] if cuda else []
        self._under_way: deque[tuple[int, Sequence[int]]] = deque()
        self._turn = 0

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, packed: Tensor, numbers: Sequence[int]) -> None:
        """Start the copy of a step's `packed` `[>= rows]`, of which the first rows count."""
        assert len(self._under_way) <= self._depth
        self._turn = (self._turn + 1) % (self._depth + 1)
        count = len(numbers)
        self._host[self._turn, :count].copy_(packed[:count], non_blocking=True)
        if self._events:
            self._events[self._turn].record(torch.cuda.current_stream(self._device))
        self._under_way.append((self._turn, numbers))

    def clear(self) -> None:
        """Forget what is under way."""
        self._under_way.clear()

    def receive(self, wait: bool) -> StepTokens | None:
        """The oldest step under way; None if there is none, or it has not arrived and nobody wants to `wait`."""
        taken = self.take(wait)
        if taken is None:
            return None
        packed, numbers = taken
        return StepTokens(packed & ((1 << FINISHED_BIT) - 1), (packed >> FINISHED_BIT) > 0, numbers)

    def take(self, wait: bool) -> tuple[NDArray[np.int64], Sequence[int]] | None:
        """What was sent of it, as it is, and the numbers: in a buffer that a step sent later overwrites."""
        if not self._under_way:
            return None
        turn, numbers = self._under_way[0]
        if self._events:
            event: Any = self._events[turn]
            if not event.query():
                if not wait:
                    return None
                event.synchronize()
        self._under_way.popleft()
        return self._host[turn, : len(numbers)].numpy(), numbers
