"""`UploadRing`: numbers on their way from the host to the device, without either waiting for the other."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Uploads in flight before the host waits for the oldest, that is, how many steps it may run ahead.
DEPTH = 4


class UploadRing:
    """Host buffers of `size` int32 that take turns; pinned for a CUDA device, so that copies are asynchronous.

    Args:
        size: numbers a buffer.
        device: where they go.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        with torch.inference_mode(False):
            self._host = torch.zeros(DEPTH, size, dtype=torch.int32, device="cpu", pin_memory=cuda)
        self._arrays: NDArray[np.int32] = self._host.numpy()
        self._device = device
        self._copied = [torch.cuda.Event() for _ in range(DEPTH)] if cuda else []
        self._turn = 0

    def next(self) -> NDArray[np.int32]:
        """The buffer to fill, once its last copy is done; it holds what it held then."""
        self._turn = (self._turn + 1) % DEPTH
        if self._copied and not self._copied[self._turn].query():
            self._copied[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self, target: Tensor, count: int) -> None:
        """Copy the first `count` numbers of the buffer to `target`."""
        target[:count].copy_(self._host[self._turn, :count], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record(torch.cuda.current_stream(self._device))
