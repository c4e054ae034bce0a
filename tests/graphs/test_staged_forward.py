"""Steps over several devices: what is recorded where, and in which order a replay launches it.

Without GPUs a graph is a tape of PyTorch's operations, which a replay runs again over the same tensors.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fastattn.graphs.staged_forward import StagedForward, StagedPool

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0)


class Tape(TorchDispatchMode):
    """What stands for a CUDA graph: operations, and the tensors that they read and write."""

    def __init__(self, device: torch.device, log: list[str]) -> None:
        super().__init__()
        self.device, self._log = device, log
        self._launches: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self._launches.append((function, args, kwargs or {}, out))
        return out

    def begin(self) -> None:
        self._log.append(f"begin on {self.device}")
        self.__enter__()

    def end(self) -> Tape:
        self._log.append(f"end on {self.device}")
        self.__exit__(None, None, None)
        return self

    def abandon(self) -> None:
        self._log.append(f"abandon on {self.device}")
        self.__exit__(None, None, None)

    def replay(self) -> None:
        self._log.append(f"replay on {self.device}")
        for function, args, kwargs, out in self._launches:
            again = function(*args, **kwargs)
            if isinstance(again, Tensor) and again.data_ptr() != out.data_ptr():
                out.copy_(again)


class TapePool(StagedPool):
    """A pool whose graphs are tapes."""

    def __init__(self) -> None:
        self.first, self.recording, self.log = FIRST, None, list[str]()
        self.graphs: list[weakref.ref[Tape]] = []

    def enter(self) -> None:
        self.log.append("enter")

    def streams(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def draws_again(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def graph_on(self, device: torch.device, owner: Any) -> Any:
        tape = Tape(device, self.log)
        self.graphs.append(weakref.ref(tape))
        return tape


class Step:
    """Doubles a number on one device, adds one on another, and leaves it as the number of the next step."""

    def __init__(self, pool: TapePool) -> None:
        self._pool = pool
        self.number, self.copy = torch.ones(3), torch.zeros(3)
        self.fails = False

    def follow(self) -> None:
        self.copy.copy_(self.number)

    def __call__(self) -> Tensor:
        recording = self._pool.recording
        recording.ahead(self.follow) if recording else self.follow()
        states = [self.copy * 2, self.copy * 0 + 5]
        states = recording.cut(states, SECOND) if recording else [tensor.clone() for tensor in states]
        if self.fails and recording:
            raise RuntimeError("a launch that cannot be recorded")
        out = states[0] + 1 + 0 * states[1]
        self.number.copy_(out)
        return out


class Doubled(Step):
    """The same without what a step leaves for the next one; on the second device it reads what was copied there alone."""

    def __call__(self) -> Tensor:
        recording = self._pool.recording
        assert recording is not None
        states = recording.cut([self.number * 2], SECOND)
        # Not what the tape computed while it was recorded.
        assert states[0].tolist() == [2.0] * 3
        if self.fails:
            raise RuntimeError("a launch that cannot be recorded")
        return states[0] + 1


def captured(pool: TapePool) -> tuple[StagedForward, Step]:
    forward, step = StagedForward(pool), Step(pool)

    def warmed_up() -> None:
        assert step.number.tolist() == [3.0] * 3 and not pool.graphs
        step.number.fill_(1)

    forward.capture(step, warmed_up)
    # A tape, unlike a graph, computes while it is recorded.
    step.number.fill_(1)
    return forward, step


def test_replays() -> None:
    pool = TapePool()
    forward, step = captured(pool)
    assert pool.log == ["begin on cpu", "end on cpu", "begin on cpu:0", "end on cpu:0"] and pool.recording is None
    pool.log.clear()
    outs = [forward.replay(step) for _ in range(3)]
    assert [out.tolist() for out in outs] == [[3.0] * 3, [7.0] * 3, [15.0] * 3]
    assert pool.log == ["enter", "replay on cpu", "replay on cpu:0"] * 3
    assert forward.replay(step, copy=False) is forward.replay(step, copy=False)
    assert len({out.data_ptr() for out in outs}) == 3


def test_each_graph_runs_once_it_is_recorded() -> None:
    pool = TapePool()
    forward, step = StagedForward(pool), Doubled(pool)
    out = forward.capture_running(step)
    assert pool.log == [
        "begin on cpu", "end on cpu", "replay on cpu", "begin on cpu:0", "end on cpu:0", "replay on cpu:0",
    ]  # fmt: skip
    assert out.tolist() == [3.0] * 3 and pool.recording is None
    pool.log.clear()
    step.number.fill_(5)
    assert forward.replay(step).tolist() == [11.0] * 3 and out.tolist() == [3.0] * 3
    assert pool.log == ["enter", "replay on cpu", "replay on cpu:0"]


def test_what_was_launched_counts() -> None:
    pool = TapePool()
    forward, step = StagedForward(pool), Step(pool)
    assert forward.capture_launched(step, lambda: pool.log.append("launched")).tolist() == [3.0] * 3
    assert pool.log == ["launched", "begin on cpu", "end on cpu", "begin on cpu:0", "end on cpu:0"]
    step.number.fill_(10)
    assert forward.replay(step).tolist() == [21.0] * 3


def test_a_running_capture_that_fails() -> None:
    pool = TapePool()
    forward, step = StagedForward(pool), Doubled(pool)
    step.fails = True
    with pytest.raises(RuntimeError):
        forward.capture_running(step)
    assert pool.log[-1] == "abandon on cpu:0" and pool.recording is None
    pool.graphs.clear()
    forward, step = captured(pool)
    assert forward.replay(step).tolist() == [3.0] * 3


def test_the_host_may_write_between() -> None:
    forward, step = captured(TapePool())
    forward.replay(step)
    step.number.fill_(10)
    assert forward.replay(step).tolist() == [21.0] * 3


def test_a_capture_that_fails() -> None:
    """The graph under way is ended, those before it are let go of, and the next capture works."""
    pool = TapePool()
    forward, step = StagedForward(pool), Step(pool)
    step.fails = True
    with pytest.raises(RuntimeError):
        forward.capture(step, lambda: None)
    assert pool.log[-1] == "abandon on cpu:0" and pool.recording is None
    del forward
    gc.collect()
    assert all(graph() is None for graph in pool.graphs)
    pool.graphs.clear()
    forward, step = captured(pool)
    assert forward.replay(step).tolist() == [3.0] * 3


def test_back_again() -> None:
    """The output layer may be where the embedding is."""
    pool, number = TapePool(), torch.tensor([2.0])

    def run() -> Tensor:
        recording = pool.recording
        cross: Callable[..., Any] = recording.cut if recording else lambda states, place: [t.clone() for t in states]
        (there,) = cross([number + 1], SECOND)
        (back,) = cross([there * 10], FIRST)
        return back - 1

    forward = StagedForward(pool)
    forward.capture(run, lambda: None)
    number.fill_(4)
    assert forward.replay(run).tolist() == [49.0]
    assert [graph().device for graph in pool.graphs] == [FIRST, SECOND, FIRST]
