"""Sums over ranks of many tokens, made while the products of other tokens run: see `patches/fused/halves.py`.

Between two GPUs that read each other's memory, a sum is a copy: each rank's copy engine brings the other's part over, which
takes no multiprocessor from the products, and the norm adds both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hf_fastattn.parallel.symmetric import shared_memory

# Rows of a sum at most, half a piece of a prompt (`patches/decoder/chunked_prefill.py`), and by how many slots grow.
MOST_ROWS, ROWS_STEP = 4096, 1024


class LaterSum(NamedTuple):
    """A sum over ranks that is under way.

    Attributes:
        part: this rank's, `[T, hidden]`.
        other: the other rank's, there once `wait` was called; contiguous.
        bias: `[hidden]`, to be added once.
        wait: has what the current stream does next wait for it; the host waits for nothing.
    """

    part: Tensor
    other: Tensor
    bias: Tensor | None
    wait: Callable[[], Any]

    def ready(self, apart: bool) -> tuple[Tensor, Tensor | None]:
        """The sum, for what the current stream does next, with its bias; `apart`: its two parts, where it has no bias."""
        self.wait()
        if apart and self.bias is None:
            return self.part, self.other
        total = self.part + self.other
        return total if self.bias is None else total + self.bias.to(total.dtype), None


class CopiedSums:
    """Sums of two ranks whose GPUs read each other's memory.

    Parts are written to three slots in turn. A slot is written again by the third product after, and by then both ranks have
    met in the sum after the one that was made of it, to which they come once they have copied that.

    Args:
        group: of both ranks, which make this at the same time.
        device: this rank's.
        rows: of a part, at most.
        hidden: columns.
        dtype: of parts.
        everywhere: whether something holds on both ranks.
    """

    SLOTS = 3

    def __init__(
        self,
        group: Any,
        device: torch.device,
        rows: int,
        hidden: int,
        dtype: torch.dtype,
        everywhere: Callable[[bool], bool],
    ) -> None:
        self.rows, self.hidden, self.dtype = rows, hidden, dtype
        self.device, self.rank = device, dist.get_rank(group)
        shape = (self.SLOTS, rows, hidden)
        held, self._handle = shared_memory(math.prod(shape), dtype, device, group, everywhere)
        with torch.inference_mode(False), torch.cuda.device(device):
            self._mine = held.view(shape)
            self._theirs = self._handle.get_buffer(1 - self.rank, shape, dtype)
            # Ahead of products: the ranks meet in a launch of one program.
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._met = [torch.cuda.Event() for _ in range(self.SLOTS)]
        self._slot = 0

    def takes(self, rows: int, hidden: int, dtype: torch.dtype) -> bool:
        """Those that the slots have room for."""
        return rows <= self.rows and hidden == self.hidden and dtype is self.dtype

    def room(self, rows: int) -> Tensor:
        """Where the part of the next sum is to be written, `[rows, hidden]`: a slot, which the other rank has copied."""
        torch.cuda.current_stream(self.device).wait_event(self._met[(self._slot + 1) % self.SLOTS])
        return self._mine[self._slot, :rows]

    def begin(self, part: Tensor, bias: Tensor | None) -> LaterSum:
        """The sum of both ranks' parts; this one's lies where `room` said."""
        slot, self._slot = self._slot, (self._slot + 1) % self.SLOTS
        other, done = torch.empty_like(part), torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._handle.barrier()
            self._met[slot].record()
            other.copy_(self._theirs[slot, : len(part)], non_blocking=True)
            done.record()
        return LaterSum(part, other, bias, lambda: torch.cuda.current_stream(self.device).wait_event(done))


def is_right(sums: CopiedSums, group: Any) -> bool:
    """Whether sums are those of the process group, in each slot and twice over."""
    right, device = True, sums.device
    for number in range(2 * CopiedSums.SLOTS + 1):
        part = sums.room(sums.rows)
        # Small whole numbers, whose sums are exact.
        part.copy_((torch.arange(part.numel(), device=device) % 7 + sums.rank + number).view_as(part))
        want = part.clone()
        dist.all_reduce(want, group=group)
        found = sums.begin(part, None)
        found.wait()
        right &= torch.equal(found.part + found.other, want)
    return right
