"""`RecordedForward`: a forward, or a whole decode step, over static tensors, recorded as a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.graphs.drawn_offset import unmoved_offset


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which forwards are captured: one for all models, since cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


class CapturePool:
    """Stream and memory pool of the graphs in one `GraphStore`.

    One memory pool is enough for all: no two graphs of a model run at the same time, and an output is read or copied before
    the next replay. PyTorch frees a pool when the last graph in it is gone.

    Args:
        device: of the model.

    Attributes:
        nbytes: what the allocator took from the device while forwards were captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0
        self.stream = capture_stream(device)
        self._handle: Any = None
        self._forwards: weakref.WeakSet[RecordedForward] = weakref.WeakSet()
        self._last: torch.cuda.Stream | None = None

    def handle_for(self, forward: RecordedForward) -> Any:
        """The memory pool that a forward is to be captured in."""
        if not self._forwards:
            self._handle = torch.cuda.graph_pool_handle()
        self._forwards.add(forward)
        return self._handle

    def enter(self) -> torch.cuda.Stream:
        """The current stream, made to wait for what graphs of this model still do on another one."""
        stream = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream
        return stream


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Graphs of a model that is gone may be garbage: freeing them inside a capture, whenever Python collects, breaks it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class RecordedForward:
    """A forward that reads and writes the same device memory every time.

    Args:
        pool: shared by the forwards of a `GraphStore`.
    """

    # Devices and backends whose forwards can be recorded.
    devices: tuple[str, ...] = ("cuda",)
    backends: tuple[str, ...] = ("triton", "hopper")

    def __init__(self, pool: CapturePool) -> None:
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None

    @staticmethod
    def make_pool(device: torch.device) -> Any:
        """The pool of a store's forwards."""
        return CapturePool(device)

    @staticmethod
    def enter(pool: Any) -> None:
        """Make the current stream wait for forwards of the pool on another one."""
        pool.enter()

    def capture(self, run: Callable[[], Tensor], warmed_up: Callable[[], None]) -> None:
        """Run once to compile kernels and size their workspace, then record.

        Args:
            run: the forward; launches only, on static inputs, without a look at the device.
            warmed_up: called between the two.
        """
        pool = self._pool
        graph = torch.cuda.CUDAGraph()
        # Uploads to the static tensors are queued on the current stream.
        current = pool.enter()
        pool.stream.wait_stream(current)
        reserved = torch.cuda.memory_reserved(pool.device)
        try:
            with torch.cuda.device(pool.device), torch.cuda.stream(pool.stream):
                with unmoved_offset(pool.device):
                    run()
                warmed_up()
                with no_garbage_collection():
                    self._output = self._record(graph, run)
        finally:
            current.wait_stream(pool.stream)
            pool.nbytes += max(torch.cuda.memory_reserved(pool.device) - reserved, 0)
        self._graph = graph

    def replay(self, run: Callable[[], Tensor], copy: bool = True) -> Tensor:
        """Run the recorded launches on the current stream; returns the output.

        Args:
            run: what was captured; unused here, called by a type that has no graphs.
            copy: return a copy, not what the next replay writes to.
        """
        assert self._graph is not None and self._output is not None
        self._pool.enter()
        self._graph.replay()
        return self._output.clone() if copy else self._output

    def _record(self, graph: torch.cuda.CUDAGraph, run: Callable[[], Tensor]) -> Tensor:
        # Other threads may go on using the device meanwhile.
        handle = self._pool.handle_for(self)
        graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        try:
            output = run()
        except BaseException:
            try:
                graph.capture_end()
            except RuntimeError:
                self._clean_up(handle)
            raise
        try:
            graph.capture_end()
        except RuntimeError:
            self._clean_up(handle)
            raise
        return output

    def _clean_up(self, handle: Any) -> None:
        """Undo what PyTorch leaves behind when a launch or a wait that cannot be recorded broke the capture."""
        with contextlib.suppress(RuntimeError):
            # The allocator would go on serving the stream from the pool of the capture.
            torch._C._cuda_endAllocateToPool(self._pool.device.index or 0, handle)
        with contextlib.suppress(RuntimeError):
            # The random generator stays in capture mode until a capture succeeds.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self._pool.device)
            graph.capture_end()
