"""`StagedForward`: a step over several devices, recorded as one CUDA graph for each stretch of layers on a device.

Between two graphs hidden states are copied from device to device, in the order of both devices' streams: the host waits
for neither. What is copied lies where it lay when it was recorded, as all that graphs read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.graphs.drawn_offset import unmoved_offset
from hf_fastattn.graphs.recorded_forward import CapturePool, GraphCapture, no_garbage_collection


class StagedPool:
    """A `CapturePool` on each of several devices.

    Args:
        devices: that steps pass through, the first one first.

    Attributes:
        recording: the forward that is being recorded, if one is.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.first = devices[0]
        self._pools = {device: CapturePool(device) for device in devices}
        self.recording: StagedForward | None = None

    @property
    def nbytes(self) -> int:
        """What the allocators took from the devices while forwards were captured."""
        return sum(pool.nbytes for pool in self._pools.values())

    def enter(self) -> None:
        """Make the current stream of each device wait for what graphs of this model still do on another one."""
        for pool in self._pools.values():
            pool.enter()

    @contextmanager
    def streams(self) -> Iterator[None]:
        """A block in which the streams that graphs are captured on are current, each of its device."""
        pools = list(self._pools.values())
        # Uploads to the static tensors are queued on the current streams.
        currents = [pool.enter() for pool in pools]
        reserved = [torch.cuda.memory_reserved(pool.device) for pool in pools]
        for pool, current in zip(pools, currents, strict=True):
            pool.stream.wait_stream(current)
        try:
            with ExitStack() as stack:
                for pool in pools:
                    stack.enter_context(torch.cuda.stream(pool.stream))
                stack.enter_context(torch.cuda.device(self.first))
                yield
        finally:
            for pool, current, before in zip(pools, currents, reserved, strict=True):
                current.wait_stream(pool.stream)
                pool.nbytes += max(torch.cuda.memory_reserved(pool.device) - before, 0)

    @contextmanager
    def draws_again(self) -> Iterator[None]:
        """What is drawn inside, on any of the devices, is drawn again later."""
        with ExitStack() as stack:
            for device in self._pools:
                stack.enter_context(unmoved_offset(device))
            yield

    def graph_on(self, device: torch.device, owner: Any) -> GraphCapture:
        """A graph to record on a device, which becomes the current one."""
        torch.cuda.set_device(device)
        return GraphCapture(self._pools[device], owner)


class StagedForward:
    """A forward that reads and writes the same memory of several devices every time; see `RecordedForward`.

    Args:
        pool: shared by the forwards of a `GraphStore`.
    """

    def __init__(self, pool: StagedPool) -> None:
        self._pool = pool
        # Replays of graphs and copies between them, in order.
        self._stages: list[Callable[[], Any]] = []
        self._under_way: GraphCapture | None = None
        # Of these so many have run; None while they are only recorded.
        self._ran: int | None = None
        self._output: Tensor | None = None

    @staticmethod
    def make_pool(devices: Sequence[torch.device]) -> Any:
        """The pool of a store's forwards."""
        return StagedPool(devices)

    @staticmethod
    def enter(pool: Any) -> None:
        """Make the current streams wait for forwards of the pool on other ones."""
        pool.enter()

    def capture(self, run: Callable[[], Tensor], warmed_up: Callable[[], None]) -> None:
        """Run once to compile kernels and size their workspace, then record; see `RecordedForward.capture`.

        Args:
            run: goes on to another device by `cut`, and has `ahead` launch what no graph is to hold.
            warmed_up: called between the two.
        """
        with self._pool.streams():
            with self._pool.draws_again():
                run()
            warmed_up()
            with no_garbage_collection():
                self._output = self._record(run)

    def capture_running(self, run: Callable[[], Tensor]) -> Tensor:
        """Record without a first run; each graph is replayed once it is there, while the host records the next one.

        The host makes one pass over the layers where `capture` and a replay take two, and does not wait for the devices.

        Args:
            run: as `capture` takes it; its kernels are compiled, and their workspace has its size.

        Returns:
            The output, as `replay` would give it.
        """
        with self._pool.streams(), no_garbage_collection():
            self._ran = 0
            try:
                self._output = self._record(run)
            finally:
                self._ran = None
        return self._output.clone()

    def capture_launched(self, run: Callable[[], Tensor], launched: Callable[[], None]) -> Tensor:
        """Launch, then record; what was launched counts, and nothing is replayed.

        Args:
            run: as `capture` takes it; it may be run twice from the same inputs.
            launched: called between the two.

        Returns:
            The output of the launches.
        """
        with self._pool.streams():
            with self._pool.draws_again():
                out = run()
            launched()
            with no_garbage_collection():
                self._output = self._record(run)
        return out

    def replay(self, run: Callable[[], Tensor], copy: bool = True) -> Tensor:
        """Run the recorded launches on the current streams; returns the output; see `RecordedForward.replay`."""
        assert self._output is not None
        self._pool.enter()
        for stage in self._stages:
            stage()
        return self._output.clone() if copy else self._output

    def ahead(self, launch: Callable[[], None]) -> None:
        """Have each replay begin with `launch`, which no graph holds."""
        self._stages.insert(0, launch)

    def cut(self, states: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """The graph under way ends with these tensors, and the next one begins on another device.

        Returns:
            What the next graph reads: tensors to which each replay copies `states`.
        """
        self._end()
        # Made between two graphs, so that no other graph computes in their memory.
        with torch.inference_mode(False):
            entries = [torch.empty_like(tensor, device=device) for tensor in states]

        def copies() -> None:
            for entry, tensor in zip(entries, states, strict=True):
                entry.copy_(tensor, non_blocking=True)

        self._stages.append(copies)
        self._run_recorded()
        self._begin(device)
        return entries

    def _record(self, run: Callable[[], Tensor]) -> Tensor:
        self._pool.recording = self
        try:
            self._begin(self._pool.first)
            output = run()
            self._end()
        except BaseException:
            if self._under_way is not None:
                self._under_way.abandon()
            raise
        finally:
            self._under_way = self._pool.recording = None
        return output

    def _begin(self, device: torch.device) -> None:
        self._under_way = self._pool.graph_on(device, self)
        self._under_way.begin()

    def _end(self) -> None:
        assert self._under_way is not None
        graph, self._under_way = self._under_way, None
        self._stages.append(graph.end().replay)
        self._run_recorded()

    def _run_recorded(self) -> None:
        if self._ran is not None:
            for stage in self._stages[self._ran :]:
                stage()
            self._ran = len(self._stages)
