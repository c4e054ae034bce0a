"""The ways to serve calls that begin alike, and what is measured of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hf_fastattn
from hf_fastattn.eval.generate_speed.systems import twin
from hf_fastattn.eval.matrix_cells.peaks import watched
from hf_fastattn.eval.parallel_calls.prompts import Prompts, left_padded

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@dataclass
class Way:
    """One way.

    Args:
        name: `stock`, `unshared` (ours, each row by itself), `shared` (ours) or `kept` (with pages that stay).
        model: what generates.
    """

    name: str
    model: Any
    first: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    peak: int | None = None
    computed: int | None = None
    reused: int | None = None

    def measure(self, prompts: Prompts, number: int, new: int) -> Tensor:
        """Time a call of one token and one of `1 + new`; returns the tokens of the latter."""
        first, _ = self.seconds(prompts, 2 * number, 1)
        with loop_seconds(self.model.device) as loops:
            whole, tokens = self.seconds(prompts, 2 * number + 1, 1 + new)
        self.first.append(1e3 * first)
        # What a prompt takes varies from call to call by more than a token: where the loop's own time is known, it is taken.
        self.token.append(1e3 * (sum(loops) if loops else whole - first) / new)
        call = None if self.name == "stock" else hf_fastattn.report(self.model).last_call
        if call is not None:
            self.computed, self.reused = call.prompt_tokens, call.tokens_reused
        return tokens

    def warm_up(self, prompts: Prompts, new: int) -> None:
        """Calls that are not timed: kernels are compiled, graphs recorded, and the peak of memory noted."""
        with watched(self.model.device) as peak:
            self.seconds(prompts, -1, 1 + new)
        self.peak = None if peak is None else peak.total
        for _ in range(2):
            self.seconds(prompts, -2, 1)

    def seconds(self, prompts: Prompts, number: int, new: int) -> tuple[float, Tensor]:
        """Seconds of a call of `new` tokens, and its tokens."""
        return timed(self.model, left_padded(prompts.tokens(number), self.model.device), new)

    def figures(self) -> dict[str, Any]:
        """Medians."""
        medians = {"first": statistics.median(self.first), "token": statistics.median(self.token)}
        return {**medians, "peak": self.peak, "computed": self.computed, "reused": self.reused}


def timed(model: Any, batch: dict[str, Tensor], new: int) -> tuple[float, Tensor]:
    """Seconds of a greedy call, the device idle before and after it, and its tokens."""
    wait(model.device)
    start = time.perf_counter()
    tokens: Tensor = model.generate(**batch, max_new_tokens=new, **GREEDY)
    wait(model.device)
    return time.perf_counter() - start, tokens


@contextmanager
def loop_seconds(device: torch.device) -> Iterator[list[float]]:
    """Seconds from the prompt to the last token, of each loop that runs on the device meanwhile."""
    found: list[float] = []
    if device.type != "cuda":
        yield found
        return
    # Not before: it imports Triton.
    from hf_fastattn.loop.decode_loop import DecodeLoop

    run = DecodeLoop.run

    def timed_run(loop: Any, logits: Tensor) -> Tensor:
        wait(device)
        start = time.perf_counter()
        tokens = run(loop, logits)
        wait(device)
        found.append(time.perf_counter() - start)
        return tokens

    with mock.patch.object(DecodeLoop, "run", timed_run):
        yield found


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ways(model: Any, heavy: bool, with_stock: bool = True) -> list[Way]:
    """All ways over the same weights; without those that compute every row where that is too heavy."""
    shared, kept = (
        Way("shared", hf_fastattn.patch(twin(model))),
        Way("kept", hf_fastattn.patch(twin(model), prefix_cache=True)),
    )
    if heavy:
        return [shared, kept]
    unshared = Way("unshared", hf_fastattn.patch(twin(model)))
    unshared.model._fastattn.runtime.shares_rows = False
    return [*([Way("stock", model)] if with_stock else []), unshared, shared, kept]
