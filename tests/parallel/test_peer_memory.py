"""Which sums are made in memory that all GPUs read."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric

from hf_fastattn.parallel.peer_memory import PeerMemory
from hf_fastattn.parallel.symmetric import shared_memory

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


@pytest.mark.parametrize(("mine", "others"), [(True, True), (True, False), (False, True)])
def test_ranks_exchange_handles_once_all_have_memory(mine: bool, others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits there for one that has failed would wait for minutes."""
    said: list[bool] = []

    def made(count: int, **options: Any) -> torch.Tensor:
        if not mine:
            raise torch.OutOfMemoryError("none")
        return torch.empty(count)

    def everywhere(holds: bool) -> bool:
        said.append(holds)
        return holds and others

    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(symmetric, "empty", made)
    monkeypatch.setattr(symmetric, "rendezvous", lambda held, group: said.append(True) or "handle")
    given = 8, torch.float32, torch.device("cpu"), None, everywhere
    if mine and others:
        held, handle = shared_memory(*given)
        assert len(held) == 8 and handle == "handle" and said == [True, True]
        return
    with pytest.raises(RuntimeError, match="none" if not mine else "another rank has no memory"):
        shared_memory(*given)
    # None has come to the exchange.
    assert said == [mine]
