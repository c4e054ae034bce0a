"""Times of one launch: a captured CUDA graph of many launches, replayed; on a CPU a plain loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Launch = Callable[[int], object]


class Timer:
    """Repeats `launch(i)` for i = 0, 1, ... and says how long one takes.

    Args:
        launch: takes the number of the repetition, so that it can rotate over inputs.
        repeats: launches in a graph.
        device: where it runs.
    """

    def __init__(self, launch: Launch, repeats: int, device: torch.device) -> None:
        self.launch, self.repeats, self.device = launch, repeats, device
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._capture()
        else:
            launch(0)

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for i in range(min(self.repeats, 3)):
                self.launch(i)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(self.repeats):
                self.launch(i)
        self._graph.replay()

    def __call__(self) -> float:
        """Seconds of one launch."""
        if self._graph is None:
            start = time.perf_counter()
            for i in range(self.repeats):
                self.launch(i)
            return (time.perf_counter() - start) / self.repeats
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3 / self.repeats


def interleaved(timers: Sequence[Timer], rounds: int) -> list[list[float]]:
    """Times of each timer, `rounds` of them, taken in turn in alternating order, so that drifts cancel in ratios."""
    times: list[list[float]] = [[] for _ in timers]
    for number in range(rounds):
        order = range(len(timers)) if number % 2 == 0 else reversed(range(len(timers)))
        for index in order:
            times[index].append(timers[index]())
    return times


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios ours / theirs of the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
