"""Requests of different lengths: `generate_batch()` of stock and of the patched model, and padded calls of `generate()`.

    python -m hf_fastattn.eval.batching --case ragged outputs --output results
    python -m hf_fastattn.eval.batching --case mixed --requests 128 --stock-seconds 20 --stock-new 16

Offline cases are served in interleaved rounds; in the others requests arrive while rows decode, and what counts is the time
between tokens. Some requests' tokens are compared with stock's first. The exit status is 1 if ours is slower than stock,
falls back, chooses other tokens, keeps pages, or a case fails.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import hf_fastattn
from hf_fastattn.eval.accuracy import variants
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.batching_calls.cases import ON_CPU, ON_GPU, Case, arriving
from hf_fastattn.eval.batching_calls.check import check
from hf_fastattn.eval.batching_calls.figures import arrival_figures, load_figures, problems
from hf_fastattn.eval.batching_calls.plot import draw
from hf_fastattn.eval.batching_calls.served import Served, serve
from hf_fastattn.eval.batching_calls.table import briefly, markdown
from hf_fastattn.eval.batching_calls.ways import Way, Ways, patched_twin
from hf_fastattn.eval.choices import SHIPPED
from hf_fastattn.eval.generate_speed.bench import free_memory
from hf_fastattn.eval.kernel_speed.ceilings import measure_ceilings
from hf_fastattn.eval.matrix_cells.measure import SLOWER
from hf_fastattn.eval.models import load
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.case_loop import measured_cases
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.shapes import random_model

# Options of the command that records show.
SETTINGS = ("layers", "pairs", "patch", "stock_seconds", "stock_new")
# Rows of padded calls that are tried.
SIZES = {"cuda": (64, 256), "cpu": (8, 32)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was red or failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    made = parser("bench batching")
    options = made.parse(argv)
    device = torch.device(options.device or default_device())
    if device.type not in SLOWER:
        made.error(f"argument --device: must be cuda or cpu, got {options.device}")
    if options.layers and not (options.shape or (device.type == "cuda" and options.model is None)):
        made.error("argument --layers: a checkpoint has the layers that it has; give --shape")
    auto = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    start = time.perf_counter()
    try:
        bench = _Bench(options, device, dtype)
    except ValueError as error:
        made.error(f"argument --patch: {error}")
    cases = ((name, functools.partial(bench.measure, name)) for name in options.case)
    rows, failed = measured_cases(cases, briefly, start)
    record = {
        "command": command("hf_fastattn.eval.batching", argv),
        "environment": environment(device),
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "dtype": str(dtype).removeprefix("torch."),
        "read_tbs": bench.read and bench.read / 1e12,
        "seconds": time.perf_counter() - start,
        "cases": rows,
        "failed": failed,
    }
    report.write(options.output, "batching", markdown(record), record, lambda pyplot: draw(pyplot, record))
    print(json.dumps(report.finite(record)))
    return 1 if failed or any(row["red"] for row in rows) else 0


class _Bench:
    """Measures cases, of which those of one model come one after the other."""

    def __init__(self, options: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._options, self._device, self._dtype = options, device, dtype
        self._patch = dict(variants.parse(options.patch).options)
        self._model: Any = None
        self._named = ""
        self.read: float | None = None

    def measure(self, name: str) -> dict[str, Any]:
        """The record of one case."""
        case = (ON_GPU if self._device.type == "cuda" else ON_CPU)[name]
        case = case.limited(self._options.requests, self._options.most_new)
        self._load(case)
        if self.read is None and self._device.type == "cuda":
            self.read = measure_ceilings(self._device, self._dtype).read
        free_memory()
        patched = patched_twin(self._model, self._patch)
        try:
            kinds = {"offline": self._offline, "arrival": self._arrival, "load": self._rates}
            found = kinds[case.kind](case, patched)
        finally:
            hf_fastattn.unpatch(patched)
        served = found.pop("served")
        del patched
        free_memory()
        verdict = check(self._model, served)
        found["red"] += [] if verdict.agrees else [verdict.detail]
        shown = {"kind": case.kind, "model": self._named, "requests": case.requests, "prompt": case.prompt}
        shown |= {"new": case.new, "log": case.log, "long_prompt": case.long_prompt, "scaled": case.said}
        return {**shown, "agrees": verdict.agrees, "detail": verdict.detail, "aims": dict(case.aims), **found}

    def _load(self, case: Case) -> None:
        options = self._options
        shape = options.shape or (case.shape if self._device.type == "cuda" and options.model is None else None)
        layers = f", {options.layers} layers" if options.layers else ""
        named = f"{shape}, random weights{layers}" if shape else options.model or "the shipped checkpoint"
        if named == self._named:
            return
        self._model, self._named = None, ""
        free_memory()
        if shape:
            self._model = random_model(shape, self._device, self._dtype, options.layers)
        else:
            self._model, _ = load(options.model or str(SHIPPED), self._dtype, str(self._device))
        self._named = named
        most = self._model.config.get_text_config().max_position_embeddings
        if case.longest > most:
            raise ValueError(f"the case takes {case.longest} positions, but the model has {most}; give another --shape")

    def _asks(self, case: Case, number: int) -> Any:
        return case.asks(self._model.config.get_text_config().vocab_size, number)

    # ---- all at once ------------------------------------------------------------------------------------------

    def _offline(self, case: Case, patched: Any) -> dict[str, Any]:
        ways = Ways(self._model, patched, self._options.sizes or SIZES[self._device.type], self._options)
        found = ways.make(self._asks(case, 0))
        for pair in range(self._options.pairs):
            asks = self._asks(case, 1 + pair)
            for way in found[:: 1 if pair % 2 else -1]:
                if pair < way.rounds:
                    way.seconds.append(way.run(asks))
        tokens = sum(ask.new for ask in asks)
        systems = {way.name: way.figures(self._model, tokens, self.read) for way in found}
        ours = found[-1]
        whole = systems["ours"]["gap_ms"]["median"] * 1e-3 * case.whole if case.midway else None
        ratios = {way.name: _ratio(ours, way) for way in found[:-1]}
        return {
            "tokens": tokens,
            "systems": systems,
            "ratios": ratios,
            "whole_s": whole,
            "red": [*ours.wrong, *self._slower(found)],
            "served": ours.served,
        }

    def _slower(self, ways: Sequence[Way]) -> list[str]:
        by_name = {way.name: way for way in ways}
        found = []
        for ours, stock in (("ours", "stock_batch"), ("patched_padded", "stock_padded")):
            if ours in by_name and stock in by_name:
                ratio = _ratio(by_name[ours], by_name[stock])
                found += [f"{ours} takes {ratio:.2f} of {stock}"] if ratio > SLOWER[self._device.type] else []
        return found

    # ---- one by one -------------------------------------------------------------------------------------------

    def _managers(self, case: Case, patched: Any) -> dict[str, tuple[Callable[..., Served], str]]:
        """What serves requests, and with which attention."""
        found, ways = {}, Ways(self._model, patched, (), self._options)
        if "stock_batch" in self._options.system:
            model, name = ways.stock_manager(self._asks(case, 0))
            found["stock_batch"] = (partial(serve, model, batching=ways.batching(model)), name)
        return {**found, "ours": (partial(serve, patched), "")}

    def _arrival(self, case: Case, patched: Any) -> dict[str, Any]:
        systems, red, served = {}, [], Served([])
        for name, (run, said) in self._managers(case, patched).items():
            free_memory()
            for number in range(2 if name == "ours" else 1):
                served = run(self._asks(case, number))
            systems[name] = {**arrival_figures(served), "said": [said] if said else []}
            red += problems(patched, len(served.asks)) if name == "ours" else []
        return {"systems": systems, "red": red, "served": served}

    def _points(self, run: Callable[..., Served], case: Case, warms_up: bool) -> tuple[list[dict[str, Any]], Served]:
        """The figures of all requests at once, then of each rate."""
        asks = self._asks(case, 0)
        if warms_up:
            run(asks, set())
        served = run(asks)
        points = [{"share": None, "offered": None, **load_figures(served)}]
        for number, share in enumerate(self._options.rates):
            offered = share * points[0]["requests_s"]
            served = run(arriving(self._asks(case, 1 + number), offered))
            points.append({"share": share, "offered": offered, **load_figures(served)})
        return points, served

    def _rates(self, case: Case, patched: Any) -> dict[str, Any]:
        systems, red, served = {}, [], Served([])
        for name, (run, said) in self._managers(case, patched).items():
            free_memory()
            points, served = self._points(run, case, name == "ours")
            systems[name] = {"points": points, "said": [said] if said else []}
            red += problems(patched, len(served.asks)) if name == "ours" else []
        return {"systems": systems, "red": red, "served": served}


def _ratio(ours: Way, other: Way) -> float:
    """The median of the rounds' ratios, or where the other took part in fewer the ratio of medians."""
    if len(ours.seconds) == len(other.seconds):
        return statistics.median(a / b for a, b in zip(ours.seconds, other.seconds, strict=True))
    return statistics.median(ours.seconds) / statistics.median(other.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
