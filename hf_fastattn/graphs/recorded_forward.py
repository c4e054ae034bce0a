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
        self._forwards: weakref.WeakSet[Any] = weakref.WeakSet()
        self._last: torch.cuda.Stream | None = None

    def handle_for(self, forward: Any) -> Any:
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


class GraphCapture:
    """A CUDA graph while it is recorded, on the current stream of the current device, which is its pool's.

    Args:
        pool: whose memory the graph computes in.
        owner: the forward that the graph belongs to; the pool's memory is kept while one exists.
    """

    def __init__(self, pool: CapturePool, owner: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._device, self._handle = pool.device, pool.handle_for(owner)

    def begin(self) -> None:
        """Launches from here on are recorded."""
        # Other threads may go on using the device meanwhile.
        self._graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")

    def end(self) -> torch.cuda.CUDAGraph:
        """The graph of the launches since `begin()`."""
        try:
            self._graph.capture_end()
        except RuntimeError:
            self._clean_up()
            raise
        return self._graph

    def abandon(self) -> None:
        """What was recorded is not wanted; PyTorch may go on as before."""
        try:
            self._graph.capture_end()
        except RuntimeError:
            self._clean_up()

    def _clean_up(self) -> None:
        """Undo what PyTorch leaves behind when a launch or a wait that cannot be recorded broke the capture."""
        with contextlib.suppress(RuntimeError):
            # The allocator would go on serving the stream from the pool of the capture.
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._handle)
        with contextlib.suppress(RuntimeError):
            # The random generator stays in capture mode until a capture succeeds.
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self._device)
            graph.capture_end()


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
                    self._output = self._record(run)
        finally:
            current.wait_stream(pool.stream)
            pool.nbytes += max(torch.cuda.memory_reserved(pool.device) - reserved, 0)

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

    def _record(self, run: Callable[[], Tensor]) -> Tensor:
        graph = GraphCapture(self._pool, self)
        graph.begin()
        try:
            output = run()
        except BaseException:
            graph.abandon()
            raise
        self._graph = graph.end()
        return output
