"""Calls whose rows begin alike, and calls that begin as earlier ones did: what sharing pages saves.

    python -m hf_fastattn.eval.parallel --rows 16 64 --length 8192 --output results

Every case runs in four ways in turn: stock, ours without sharing, ours, and ours with `prefix_cache`, whose later calls find
the pages of the first. The exit status is 1 if more is computed than has to be, sharing makes a call slower, or a case
fails.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import hf_fastattn
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.generate_speed.bench import free_memory
from hf_fastattn.eval.parallel_calls.prompts import Prompts, most_to_compute
from hf_fastattn.eval.parallel_calls.systems import Way, timed, ways
from hf_fastattn.eval.parallel_calls.table import draw, markdown
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.case_loop import measured_cases
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.shapes import random_model

# Sharing may take this much longer than no sharing before a case is red.
SLOWER = {"cuda": 1.03, "cpu": 1.15}
# Milliseconds that make no difference.
NOISE = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was red or failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = parser("bench parallel").parse(argv)
    device = torch.device(options.device or default_device())
    auto = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    start = time.perf_counter()
    model = random_model(options.shape, device, dtype, options.layers)

    def measure(kind: str, count: int, length: int) -> dict[str, Any]:
        measured = _turns(model, length, options) if kind == "turns" else _case(model, kind, count, length, options)
        return {"kind": kind, "rows": count, "length": length, **measured}

    cases = ((f"{case[0]}, {case[1]} x {case[2]}", functools.partial(measure, *case)) for case in _cases(options))
    rows, failed = measured_cases(cases, lambda row: _briefly(row["systems"]), start)
    record = {
        "command": command("hf_fastattn.eval.parallel", argv),
        "environment": environment(device),
        "settings": {name: getattr(options, name) for name in ("shape", "layers", "own", "turns", "new", "pairs", "most")},
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - start,
        "cases": rows,
        "failed": failed,
    }
    report.write(options.output, "parallel", markdown(record), record, lambda pyplot: draw(pyplot, record))
    print(json.dumps(report.finite(record)))
    return 1 if failed or any(row["red"] for row in rows) else 0


def _briefly(systems: dict[str, dict[str, Any]]) -> str:
    """What a run that is cut short leaves behind."""
    return "; ".join(
        f"{name} first {found['first']:.1f}, a token {found['token']:.2f} ms" for name, found in systems.items()
    )


def _cases(options: Any) -> list[tuple[str, int, int]]:
    if options.case:
        return list(options.case)
    found = []
    for kind in options.kind:
        for length in options.length:
            found += [(kind, count, length) for count in ([1] if kind == "turns" else options.rows)]
    return found


def _case(model: Any, kind: str, count: int, length: int, options: Any) -> dict[str, Any]:
    free_memory()
    prompts = Prompts(kind, count, length, options.own, model.config.vocab_size)
    found = ways(model, count * (length + options.own) > options.most, not options.no_stock)
    for way in found:
        way.warm_up(prompts, options.new)
    for pair in range(options.pairs):
        for way in found[:: 1 if pair % 2 else -1]:
            way.measure(prompts, pair, options.new)
    least = most_to_compute(prompts.tokens(2 * options.pairs - 1), 16)
    by_name = {way.name: way for way in found}
    return {"least": least, "systems": {way.name: way.figures() for way in found}, "red": _red(by_name, least)}


def _red(by_name: dict[str, Way], least: int) -> list[str]:
    red = []
    shared, kept = by_name["shared"], by_name["kept"]
    # Where little is in common, rows are computed by themselves.
    if shared.computed is not None and shared.computed > least + 512:
        red.append(f"{shared.computed} tokens were computed instead of {least}")
    if kept.computed is not None and shared.computed is not None and kept.computed > shared.computed:
        red.append(f"{kept.computed} tokens were computed, although pages stay")
    for other in {"unshared", "stock"} & by_name.keys():
        limit = SLOWER.get(shared.model.device.type, 1.0)
        for word in ("first", "token"):
            ours, theirs = (statistics.median(getattr(way, word)) for way in (shared, by_name[other]))
            # The difference of two short calls may come out below zero.
            if ours > limit * max(theirs, 0.0) + NOISE:
                red.append(f"{word}: {ours:.1f} ms, {other} {theirs:.1f}")
    for way in (shared, kept):
        call = hf_fastattn.report(way.model).last_call
        if call is None or call.fallbacks or call.prefix_unused:
            red.append(f"{way.name} fell back")
    return red


def _turns(model: Any, length: int, options: Any) -> dict[str, Any]:
    """A chat that begins with `length` tokens: a turn adds `own` tokens and an answer of `new`, without a cache by hand."""
    free_memory()
    found = [way for way in ways(model, False, not options.no_stock) if way.name != "unshared"]
    red, computed = [], []
    for way in found:
        ids, known = _drawn(model, length, 0), 0
        for turn in range(options.turns):
            ids = torch.cat((ids, _drawn(model, options.own, 1 + turn)), 1)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            first, _ = timed(way.model, batch, 1)
            whole, ids = timed(way.model, batch, 1 + options.new)
            way.first.append(1e3 * first)
            way.token.append(1e3 * (whole - first) / options.new)
            if way.name == "kept":
                call = hf_fastattn.report(way.model).last_call
                assert call is not None
                # The call of one token has left all of the prompt but its last token.
                computed.append(call.prompt_tokens)
                known = ids.shape[1] - 1
        assert way.name != "kept" or known > 0
    if any(count != 1 for count in computed):
        red.append(f"a second call of a turn computed {max(computed)} tokens")
    return {"least": 1, "systems": {way.name: way.figures() for way in found}, "red": red}


def _drawn(model: Any, count: int, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (1, count), generator=made).to(model.device)


if __name__ == "__main__":
    raise SystemExit(main())
