"""`GeneratedRows`: the new tokens of a call on the host, and which of its rows have finished."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.loop.readback import StepTokens
from hf_fastattn.loop.request import LoopRequest


class GeneratedRows:
    """Collects what steps chose, in order.

    Args:
        input_ids: `[B, S]` the prompt.
        most: most new tokens of a row.
        request: of the call.

    Attributes:
        finished: `[B]` bool.
        steps: that were taken.
    """

    def __init__(self, input_ids: Tensor, most: int, request: LoopRequest) -> None:
        rows, prompt = input_ids.shape
        self._request, self._most, self._prompt = request, most, prompt
        # A stop string may begin in the prompt.
        self._all: NDArray[np.int64] = np.full((rows, prompt + most), request.pad, np.int64)
        if request.stop_strings is not None:
            self._all[:, :prompt] = input_ids.cpu().numpy()
        self.finished: NDArray[np.bool_] = np.zeros(rows, np.bool_)
        self.steps = 0

    @property
    def done(self) -> bool:
        """All rows have finished."""
        return self.steps >= self._most or (self.steps > 0 and bool(self.finished.all()))

    def take(self, step: StepTokens) -> set[int]:
        """Add a step; returns the rows that finish in it by a stop string, which only the host checks."""
        numbers = np.asarray(step.numbers, np.int64)
        going = ~self.finished[numbers]
        column = self._prompt + self.steps
        self._all[numbers[going], column] = step.tokens[going]
        self.finished[numbers[going]] = step.finished[going]
        self.steps += 1
        if self._request.stop_strings is None:
            return set()
        found = self._request.stop_strings(torch.from_numpy(self._all[:, : column + 1]), None).numpy() & ~self.finished
        self.finished |= found
        return set(np.flatnonzero(found).tolist())

    def newest(self) -> Tensor:
        """`[B]` int64 tokens of the last step."""
        return torch.from_numpy(self._all[:, self._prompt + self.steps - 1].copy())

    def new_of(self, number: int) -> NDArray[np.int64]:
        """`[steps]` tokens of row `number`, padding after its end."""
        return self._all[number, self._prompt : self._prompt + self.steps].copy()

    def tokens(self) -> Tensor:
        """`[B, steps]` int64."""
        return torch.from_numpy(self._all[:, self._prompt : self._prompt + self.steps].copy())
