"""Sums of prompts beside products: what waits for what, without a GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from hf_fastattn.parallel.later_sums import CopiedSums, LaterSum

ROWS, HIDDEN = 4, 3


class Event:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record(self) -> None:
        self.log.append(f"record {self.name}")


class Stream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_event(self, event: Event) -> None:
        self.log.append(f"products wait for {event.name}")

    def wait_stream(self, other: Any) -> None:
        self.log.append("copies wait for products")


class Handle:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def barrier(self) -> None:
        self.log.append("ranks meet")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def sums(log: list[str], monkeypatch: pytest.MonkeyPatch) -> CopiedSums:
    made: Any = object.__new__(CopiedSums)
    made.rows, made.hidden, made.dtype, made.device, made.rank = ROWS, HIDDEN, torch.float32, torch.device("cpu"), 0
    made._mine, made._theirs = torch.zeros(CopiedSums.SLOTS, ROWS, HIDDEN), torch.ones(CopiedSums.SLOTS, ROWS, HIDDEN)
    made._met = [Event(log, f"met {slot}") for slot in range(CopiedSums.SLOTS)]
    made._stream, made._handle, made._slot = Stream(log), Handle(log), 0
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(log))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log, "copied"))
    return made


def test_a_slot_is_written_once_the_ranks_have_met_after_it_was_copied(sums: CopiedSums, log: list[str]) -> None:
    """The third product after writes it; the ranks met in the sum after the one that copied it."""
    slots: list[int] = []
    for number in range(7):
        log.clear()
        part = sums.room(2)
        slots.append(next(slot for slot in range(CopiedSums.SLOTS) if part.data_ptr() == sums._mine[slot].data_ptr()))
        # The sum before the last one.
        assert log == [f"products wait for met {(number - 2) % 3}"]
        log.clear()
        found = sums.begin(part.fill_(number), None)
        assert log == ["copies wait for products", "ranks meet", f"record met {slots[-1]}", "record copied"]
        log.clear()
        found.wait()
        assert log == ["products wait for copied"]
        assert found.other.tolist() == [[1.0] * HIDDEN] * 2
    assert slots == [0, 1, 2, 0, 1, 2, 0]


def test_sizes(sums: CopiedSums) -> None:
    assert sums.takes(ROWS, HIDDEN, torch.float32)
    for other in ((ROWS + 1, HIDDEN, torch.float32), (1, HIDDEN + 1, torch.float32), (1, HIDDEN, torch.float16)):
        assert not sums.takes(*other)


def test_what_a_norm_is_given() -> None:
    waited: list[int] = []
    part, other, bias = torch.ones(2, 3), torch.full((2, 3), 2.0), torch.full((3,), 0.5)
    apart = LaterSum(part, other, None, lambda: waited.append(1)).ready(apart=True)
    assert apart[0] is part and apart[1] is other
    for made, want in (
        (LaterSum(part, other, None, lambda: waited.append(1)), 3.0),
        (LaterSum(part, other, bias, lambda: waited.append(1)), 3.5),
    ):
        total, nothing = made.ready(apart=made.bias is not None)
        assert nothing is None and total.tolist() == [[want] * 3] * 2
    assert len(waited) == 3
