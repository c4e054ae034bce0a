"""One side of a cell, stock or ours: a model in its state, and how it is called and timed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hf_fastattn
from hf_fastattn.eval.generate_speed.systems import Timing, twin
from hf_fastattn.eval.matrix_cells.calls import CALLS
from hf_fastattn.eval.matrix_cells.cells import Cell
from hf_fastattn.eval.matrix_cells.families import BY_INTERFACE, INTERFACE, SIZES, build
from hf_fastattn.eval.matrix_cells.peaks import Peak, watched
from hf_fastattn.eval.matrix_cells.states import around, dtype_of, lifted, put
from hf_fastattn.interface import counters


@dataclass
class Side:
    """A model of a cell; `timings` and `peak` are filled by what is run."""

    name: str
    model: Any
    cell: Cell
    device: torch.device
    timings: list[Timing] = field(default_factory=list)
    peak: Peak | None = None

    def generate(self, seed: int, tokens: int, **options: Any) -> Any:
        """One call of the cell's kind; two in a chat, whose times are those of both."""
        with around(self.cell.state, self.device):
            return self._generate(seed, tokens, options)

    def tokens(self, seed: int, tokens: int) -> Tensor:
        """The tokens of a call."""
        found: Tensor = self.generate(seed, tokens)
        return found

    def first_logits(self, seed: int) -> Tensor:
        """The logits that the first token was chosen from, in the last turn of a chat."""
        with around(self.cell.state, self.device):
            return self._logits(seed)

    def exact_logits(self, seed: int) -> Tensor:
        """The same of the model in a wider dtype, and nothing around it."""
        with lifted(self.model, self.cell.state):
            return self._logits(seed)

    def warm_up(self, new: int) -> None:
        """The first calls, in which kernels are compiled and graphs recorded; the peak of memory is taken here."""
        with watched(self.device) as self.peak:
            for tokens in (1 + new, 1 + new, 1, 1):
                self._seconds(0, tokens)

    def measure(self, seed: int, new: int) -> None:
        """Time a call of one token and one of `1 + new`."""
        first, whole = self._seconds(2 * seed, 1), self._seconds(2 * seed + 1, 1 + new)
        self.timings.append(Timing(first, (whole - first) / new))

    def _logits(self, seed: int) -> Tensor:
        found = self._generate(seed, 1, {"return_dict_in_generate": True, "output_logits": True})
        logits: Tensor = found.logits[0].float()
        return logits

    def _generate(self, seed: int, tokens: int, options: Mapping[str, Any]) -> Any:
        torch.manual_seed(seed)
        common = {"max_new_tokens": tokens, **options}
        return CALLS[self.cell.call](self.model, SIZES[self.device.type], seed, common)

    def _seconds(self, seed: int, tokens: int) -> float:
        self._wait()
        start = time.perf_counter()
        self.generate(seed, tokens)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def sides(cell: Cell, device: torch.device, options: Mapping[str, Any]) -> tuple[Side, Side]:
    """(stock, ours) of a cell, over the same weights.

    Raises:
        ImportError: a package that the state needs is not installed.
    """
    stock = build(cell.family, device, dtype_of(cell.state))
    other = twin(stock)
    if cell.family in BY_INTERFACE:
        hf_fastattn.register()
        other.set_attn_implementation(INTERFACE)
    stock, other = put(stock, cell.state), put(other, cell.state)
    if cell.family not in BY_INTERFACE:
        hf_fastattn.patch(other, **options)
    counters.reset()
    return Side("stock", stock, cell, device), Side("ours", other, cell, device)


def path_of(side: Side) -> str:
    """Which path our last call ran on, and why not on a faster one."""
    call = hf_fastattn.report(side.model).last_call
    if call is None:
        falls = "".join(f"; {reason} ({count})" for reason, count in counters.fallbacks.items())
        return f"kernels {dict(counters.kernels)}{falls}"
    words = ["the device's loop" if call.fast_loops else f"{call.forwards} paged forwards"]
    if call.graphs_replayed or call.appends_replayed:
        words.append(f"{call.graphs_replayed} steps and {call.appends_replayed} prompts replayed")
    words += [f"layer by layer: {reason} ({count})" for reason, count in call.uncaptured.items()]
    words += [f"fell back: {reason} ({count})" for reason, count in call.fallbacks.items()]
    return "; ".join(words)
