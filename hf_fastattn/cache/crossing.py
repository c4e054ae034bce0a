"""`Crossing`: how a step over static tensors goes on from layers on one device to those on another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fastattn.cache.batch import Batch


@dataclass(frozen=True)
class Crossing:
    """What a step has on each of its devices.

    Attributes:
        batches: what layers there write and read.
        positions: `[B, 1]` int64 of the new tokens.
        send: hidden states, to a device.
    """

    batches: Mapping[torch.device, Batch]
    positions: Mapping[torch.device, Tensor]
    send: Callable[[Sequence[Tensor], torch.device], list[Tensor]]
