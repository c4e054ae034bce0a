"""The ways to run `generate()` that are compared, and how one call of them is timed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.eval.generate_speed.cases import ENDING, Case


def twin(model: Any) -> Any:
    """A second model over the same weights: to be patched, or compiled, while the first stays stock."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def twin_without_switch(model: Any) -> Any:
    """A twin whose experts run by `grouped_mm` in steps too, from which `generate()` would switch to `batched_mm`: quicker
    where many rows choose the same experts, whose weights the latter copies for each."""
    other = twin(model)
    other._optimize_model_for_decode = contextlib.nullcontext
    return other


@dataclass(frozen=True)
class Timing:
    """Seconds: until the first token (a whole call of one token), and a token after it."""

    first: float
    token: float


@dataclass
class System:
    """A model and how it is called.

    Args:
        name: `stock`, `grouped_mm`, `compiled`, `stays` or `patched`.
        model: what generates.
        new: tokens after the first that are timed.
        options: further options of `generate()`.
        borrowed: the model is another system's too, whose first call and peak are noted, not this one's.
        timings: what was measured.
        peak: bytes of the largest allocation seen, weights included; None on a CPU.
        first_call: seconds of the first call of this case.
    """

    name: str
    model: Any
    new: int
    options: dict[str, Any] = field(default_factory=dict)
    borrowed: bool = False
    timings: list[Timing] = field(default_factory=list)
    peak: int | None = None
    first_call: float | None = None

    @property
    def device(self) -> torch.device:
        """Of the model."""
        device: torch.device = self.model.device
        return device

    def seconds(self, case: Case, number: int, tokens: int, rows: int | None = None) -> float:
        """Seconds of a whole call of `tokens` new tokens on the prompts `number`, the device idle before and after it."""
        ids = case.ids(self.model.config.get_text_config().vocab_size, number, self.device)
        arguments = {**case.arguments(rows), **self.options}
        if case.kind in ENDING:
            end_rows_after(self.model, case.lengths(tokens))
        torch.manual_seed(number)
        self._wait()
        start = time.perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **arguments)
        self._wait()
        return time.perf_counter() - start

    def measure(self, case: Case, number: int) -> None:
        """Time one call of a single token and one of `1 + new`, each on prompts of its own.

        No callback takes the time: one would force a loop that calls without callbacks may not have to run.
        """
        first = self.seconds(case, 2 * number, 1)
        whole = self.seconds(case, 2 * number + 1, 1 + self.new)
        self.timings.append(Timing(first, (whole - first) / self.new))

    def warm_up(self, case: Case) -> None:
        """The first call of a case, with its time and its peak of memory; then those in which prompts' graphs are made."""
        if self.borrowed:
            self.seconds(case, 0, 1 + self.new)
        else:
            with self.watched():
                self.first_call = self.seconds(case, 0, 1 + self.new)
        # With drafts a whole call's first forward is longer than that of a call of one token: two prompts, each twice.
        for tokens in (1, 1 + self.new, 1) if case.kind == "drafts" else (1,):
            self.seconds(case, 0, tokens)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the peak of memory inside the block; the model must hold nothing but weights before it."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        self.peak = torch.cuda.max_memory_allocated(self.device) - before + held_bytes(self.model)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def end_rows_after(model: Any, lengths: list[int] | None) -> None:
    """Let the rows of a patched model's calls end after so many new tokens, whatever tokens these are.

    It works in the loop that runs on the device; what counts as its own path (`problems`) says whether that one ran.
    """
    runtime = model._fastattn.runtime
    assert hasattr(runtime, "row_limits")
    runtime.row_limits = lengths


def held_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers."""
    tensors: dict[int, Tensor] = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
