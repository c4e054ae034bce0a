"""`PeerMemory`: memory of each rank's GPU that the GPUs of the other ranks, on the same host, read.

There sums of few tokens are made without NCCL: a product writes its part of the sum where the other ranks read it, and the
norm behind it reads all parts (`kernels/layer/summed_norm.py`). Parts are written in two slots in turn. Of the fewest tokens
the norm writes the part to the inbox of every rank instead (`kernels/layer/pushed_norm.py`).
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hf_fastattn.parallel.later_sums import LaterSum
from hf_fastattn.parallel.symmetric import shared_memory

# Rows of a sum that the slots hold, and bytes that a rank reads of those of the others; more are summed by NCCL, in whose
# sums each byte crosses twice, however many ranks there are. Four H200 took as long either way at about this size.
MOST_ROWS, MOST_READ = 64, 2**20
# Rows of a sum that are pushed into inboxes. They cross in twice as many bytes, without waiting for a flag.
MOST_PUSHED = 16
# Bytes of a part in a word of an inbox, and of the word; words of a row, at most.
HELD, WORD, MOST_WORDS = 4, 8, 8192
# Looks at a flag in the first sums: some seconds, in which the other ranks compile the kernel too.
LOOKS_IN_TRIAL = 1 << 24


class PeerSum(NamedTuple):
    """A sum over ranks that nobody has computed yet.

    Attributes:
        part: this rank's, `[T, hidden]`, in a slot.
        slot: its number.
        bias: `[hidden]`, to be added once.
        group: of the ranks, for those who sum by NCCL.
    """

    memory: PeerMemory
    part: Tensor
    slot: int
    bias: Tensor | None
    group: Any


# What the next norm adds to the residual stream: a tensor, a sum over ranks that is not made yet or under way, or nothing.
Delta: TypeAlias = Tensor | PeerSum | LaterSum | None


class PeerMemory:
    """The slots of one model's ranks, and the flags by which these tell each other that a slot is written.

    Args:
        group: the process group; every rank makes its memory at the same time.
        device: this rank's.
        hidden: columns of a sum.
        dtype: of its parts.
        everywhere: whether something holds on all ranks.

    Attributes:
        flags: `[ranks]` int64 addresses, as this device sees them.
        launches: `[MOST_ROWS]` int32, see `summed_norm`; `late` likewise.
        inboxes: `[ranks]` int64 addresses of the inboxes, with room for `MOST_PUSHED` rows; see `pushed_norm`.
        pushed: `[MOST_PUSHED]` int32, its `launches`.
    """

    def __init__(
        self, group: Any, device: torch.device, hidden: int, dtype: torch.dtype, everywhere: Callable[[bool], bool]
    ) -> None:
        self.rank: int = torch.distributed.get_rank(group)
        self.hidden, self.dtype = hidden, dtype
        slot_bytes = MOST_ROWS * hidden * dtype.itemsize
        flag_bytes = -(-MOST_ROWS * group.size() * 4 // 256) * 256
        self._words = 0 if hidden * dtype.itemsize % HELD else hidden * dtype.itemsize // HELD
        inbox_bytes = 2 * group.size() * MOST_PUSHED * self._words * WORD
        count = 2 * slot_bytes + flag_bytes + inbox_bytes
        self._held, self._handle = shared_memory(count, torch.uint8, device, group, everywhere)
        with torch.inference_mode(False), torch.cuda.device(device):
            # The trial's first sum by the group comes behind it on every rank.
            self._held.zero_()
            starts = [int(address) for address in self._handle.buffer_ptrs]
            self._slots = [
                self._held[slot * slot_bytes : (slot + 1) * slot_bytes].view(dtype).view(MOST_ROWS, hidden)
                for slot in (0, 1)
            ]
            self._parts = [
                torch.tensor([start + slot * slot_bytes for start in starts], dtype=torch.int64, device=device)
                for slot in (0, 1)
            ]
            self.flags = torch.tensor([start + 2 * slot_bytes for start in starts], dtype=torch.int64, device=device)
            inboxes = [start + 2 * slot_bytes + flag_bytes for start in starts]
            self.inboxes = torch.tensor(inboxes, dtype=torch.int64, device=device)
            self.pushed = torch.zeros(MOST_PUSHED, dtype=torch.int32, device=device)
            self.launches = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
            self.late = torch.zeros(1, dtype=torch.int32, device=device)

    def takes(self, rows: int, columns: int, dtype: torch.dtype) -> bool:
        """Whether a sum of this size is made here."""
        read = (len(self.flags) - 1) * rows * columns * dtype.itemsize
        return 0 < rows <= MOST_ROWS and read <= MOST_READ and columns == self.hidden and dtype is self.dtype

    def pushes(self, rows: int) -> bool:
        """Whether a sum of so many rows, which is made here, is pushed."""
        return rows <= MOST_PUSHED and 0 < self._words <= MOST_WORDS

    def part(self, slot: int, rows: int) -> Tensor:
        """`[rows, hidden]`: where this rank's part of a sum goes."""
        return self._slots[slot][:rows]

    def parts(self, slot: int) -> Tensor:
        """`[ranks]` int64: where the parts of all ranks are, as this device sees them."""
        return self._parts[slot]


def is_right(memory: PeerMemory, group: Any) -> bool:
    """Whether sums by peer memory are those of NCCL, in each slot, for one row and for as many as it takes."""
    # Not before: they import Triton.
    from hf_fastattn.kernels.layer.pushed_norm import pushed_norm
    from hf_fastattn.kernels.layer.summed_norm import summed_norm

    device, right = memory.flags.device, True
    for rows in (1, MOST_PUSHED, MOST_ROWS):
        residual = torch.ones(rows, memory.hidden, dtype=memory.dtype, device=device)
        for slot in (0, 1):
            part = memory.part(slot, rows)
            # Small whole numbers, whose sums are exact.
            part.copy_((torch.arange(part.numel(), device=device) % 7 + memory.rank + slot).view_as(part))
            want = part.clone()
            torch.distributed.all_reduce(want, group=group)
            _, total = summed_norm(
                part, memory.parts(slot), memory.flags, memory.launches, memory.late, memory.rank, residual, residual[0],
                1e-5, looks=LOOKS_IN_TRIAL,
            )  # fmt: skip
            right &= torch.equal(total, want + 1)
            if memory.pushes(rows):
                _, total = pushed_norm(
                    part, memory.inboxes, MOST_PUSHED, memory.pushed, memory.late, memory.rank, residual, residual[0], 1e-5,
                    looks=LOOKS_IN_TRIAL,
                )  # fmt: skip
                right &= torch.equal(total, want + 1)
    return right and not bool(memory.late)


def places_of(device: torch.device) -> list[int]:
    """Numbers for the host and the GPU of this rank, by which `why_not_peers` knows who can read whose memory."""
    host = zlib.crc32(f"{socket.gethostname()}\0{_boot()}".encode())
    return [host, device.index or 0, torch.cuda.device_count() if device.type == "cuda" else 0]


def why_not_peers(places: list[list[int]], device: torch.device) -> str | None:
    """Why the GPUs of the ranks cannot read each other's memory; None if they can.

    Args:
        places: `places_of` every rank.
        device: of this rank.
    """
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if len({host for host, _, _ in places}) > 1:
        return "ranks are on several hosts"
    others = {index for _, index, _ in places} - {device.index or 0}
    if len(others) < len(places) - 1 or any(index >= torch.cuda.device_count() for index in others):
        return "a rank's GPU is not visible to the others"
    if not all(torch.cuda.can_device_access_peer(device.index or 0, index) for index in others):
        return "a GPU cannot read another one's memory"
    return None


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read()
    except OSError:
        return ""
