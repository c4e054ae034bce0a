"""Which sums are made in memory that all GPUs read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fastattn.parallel.peer_memory import PeerMemory

BF16, FP32 = torch.bfloat16, torch.float32


def held(ranks: int, hidden: int, dtype: torch.dtype = BF16) -> PeerMemory:
    memory: Any = object.__new__(PeerMemory)
    memory.hidden, memory.dtype, memory.flags = hidden, dtype, torch.zeros(ranks, dtype=torch.int64)
    return memory


@pytest.mark.parametrize(
    ("ranks", "hidden", "dtype", "most"),
    # As many as the slots have, or as one rank reads of the others in the time that NCCL takes.
    [(2, 4096, BF16, 64), (2, 8192, BF16, 64), (4, 4096, BF16, 42), (4, 8192, BF16, 21), (8, 2048, FP32, 18)],
)
def test_few_rows(ranks: int, hidden: int, dtype: torch.dtype, most: int) -> None:
    memory = held(ranks, hidden, dtype)
    assert [rows for rows in range(200) if memory.takes(rows, hidden, dtype)] == list(range(1, most + 1))


def test_other_sums() -> None:
    memory = held(2, 64)
    assert not memory.takes(1, 128, BF16) and not memory.takes(1, 64, FP32)
