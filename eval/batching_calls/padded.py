"""The same requests by `generate()`: sorted by their prompts' lengths, in padded batches, each until its last row ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_fastattn.eval.batching_calls.cases import Ask
from hf_fastattn.eval.generate_speed.systems import end_rows_after
from hf_fastattn.eval.parallel_calls.prompts import left_padded
from hf_fastattn.eval.parallel_calls.systems import GREEDY, wait


@dataclass(frozen=True)
class Padded:
    """How requests are put into calls.

    Args:
        size: rows of a batch.
        ends: rows end after their own number of tokens, which works in the loop on the device; else each call goes on until
            its longest row has ended.
        options: of `generate()`.
        most_new: tokens after the first that are timed; the time of the others is that of as many of these.
        batches: that are timed, evenly chosen of all; the time of the others is that of as many of these.
    """

    size: int
    ends: bool = False
    options: Any = None
    most_new: int | None = None
    batches: int | None = None

    def seconds(self, model: Any, asks: Sequence[Ask]) -> float:
        """Seconds of all requests."""
        order = sorted(asks, key=lambda ask: len(ask.prompt))
        chunks = [order[first : first + self.size] for first in range(0, len(order), self.size)]
        timed = chunks
        if self.batches is not None and self.batches < len(chunks):
            timed = [chunks[(2 * place + 1) * len(chunks) // (2 * self.batches)] for place in range(self.batches)]
        return sum(self._call(model, chunk) for chunk in timed) * len(chunks) / len(timed)

    def _call(self, model: Any, asks: Sequence[Ask]) -> float:
        new = max(ask.new for ask in asks)
        if self.most_new is None or new <= 1 + 2 * self.most_new:
            return self._timed(model, asks, new)
        first, more = self._timed(model, asks, 1), self._timed(model, asks, 1 + self.most_new)
        return first + (new - 1) * (more - first) / self.most_new

    def _timed(self, model: Any, asks: Sequence[Ask], new: int) -> float:
        batch = left_padded([torch.tensor(ask.prompt) for ask in asks], model.device)
        if self.ends:
            end_rows_after(model, [min(ask.new, new) for ask in asks])
        wait(model.device)
        start = time.perf_counter()
        try:
            model.generate(**batch, max_new_tokens=new, **GREEDY, **(self.options or {}))
            wait(model.device)
        finally:
            if self.ends:
                end_rows_after(model, None)
        return time.perf_counter() - start

    def is_scaled(self, asks: Sequence[Ask]) -> bool:
        """Whether not all of it is timed."""
        count = -(-len(asks) // self.size)
        few = self.batches is not None and self.batches < count
        return few or (self.most_new is not None and max(ask.new for ask in asks) > 1 + 2 * self.most_new)
