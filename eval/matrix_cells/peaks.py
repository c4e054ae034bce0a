"""The device memory that a call takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hf_fastattn.eval.generate_speed.bench import free_memory


@dataclass
class Peak:
    """Bytes over what was there before.

    Attributes:
        allocated: most held by tensors at a time; what graphs compute in counts only while they are captured.
        graphs: in private pools of graphs, held by no tensor any more, and by nobody else to be used.
        reserved: most taken from the device.
    """

    allocated: int = 0
    graphs: int = 0
    reserved: int = 0

    @property
    def total(self) -> int:
        """What must be free for the call and for the next one."""
        return self.allocated + self.graphs


@contextmanager
def watched(device: torch.device) -> Iterator[Peak | None]:
    """A `Peak` that holds the figures after the block; None on a CPU."""
    if device.type != "cuda":
        yield None
        return
    free_memory()
    # A process that has not used the device yet has no figures to reset.
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(device)
    held, taken, pools = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), idle_in_pools(device)
    peak = Peak()
    yield peak
    peak.allocated = torch.cuda.max_memory_allocated(device) - held
    peak.reserved = torch.cuda.max_memory_reserved(device) - taken
    peak.graphs = idle_in_pools(device) - pools


def idle_in_pools(device: torch.device) -> int:
    """Bytes of private pools of CUDA graphs that no tensor holds.

    `memory_allocated` leaves them out once the tensors of a capture are gone, and yet the graphs go on to use them.
    """
    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()
    number = torch.cuda.current_device() if device.index is None else device.index
    private = [
        segment for segment in segments if segment["device"] == number and tuple(segment["segment_pool_id"]) != (0, 0)
    ]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in private)
