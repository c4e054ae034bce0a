"""Times of lm-evaluation-harness's requests: `HFLM` on the stock model, and `FastLM` on a patched one, in turn.

    python -m hf_fastattn.eval.task_speed --shape llama-3-8b --requests requests.json --output results

The requests are those of tasks that come with the project: lines to choose from with five examples before the question,
the same for all or drawn for each, words of one token, and texts to go on from. Exits with 1 if ours is slower anywhere,
computes more tokens than there are distinct ones, leaves its own path, or answers otherwise than stock's rounding can.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_fastattn.eval import models
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.generate_speed.systems import twin
from hf_fastattn.eval.harness import recorded
from hf_fastattn.eval.harness.speed_table import markdown
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.case_loop import measured_cases
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.shapes import random_model

# Tokens computed beyond the distinct ones, as a share, that a forward less may cost.
MORE_TOKENS = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a case was red or failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    made = parser("bench tasks")
    options = made.parse(argv)
    try:
        requests = recorded.record() if options.requests is None else recorded.load(options.requests)
        if options.save is not None:
            recorded.save(options.save, requests)
            return 0
        return _run(options, argv, requests)
    except (ImportError, ValueError, OSError) as error:
        made.error(str(error))


def _run(options: Any, argv: list[str], requests: list[dict[str, Any]]) -> int:
    # The harness is heavy, and is not there on every machine.
    from hf_fastattn.eval.harness.model import HFLM, FastLM

    device = torch.device(options.device or default_device())
    auto = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, auto if options.dtype == "auto" else options.dtype)
    start = time.perf_counter()
    if options.shape is None:
        model, tokenizer = models.load(options.model, dtype, str(device))
    else:
        model, tokenizer = (
            random_model(options.shape, device, dtype, options.layers),
            AutoTokenizer.from_pretrained(models.SHIPPED),
        )
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch, max_length=options.length)
    ours = FastLM(pretrained=twin(model), tokenizer=tokenizer, batch_size=options.batch, max_length=options.length)
    chosen = [one for one in requests if options.task is None or one["task"] in options.task]

    def case(one: dict[str, Any]) -> tuple[str, Any]:
        return one["task"], lambda: _measure(one, stock, ours, options)

    rows, failed = measured_cases(map(case, chosen), _briefly, start)
    record = {
        "command": command("hf_fastattn.eval.task_speed", argv),
        "environment": environment(device),
        "settings": {name: getattr(options, name) for name in ("shape", "layers", "batch", "documents", "pairs")},
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - start,
        "cases": rows,
        "failed": failed,
    }
    report.write(options.output, "harness-speed", markdown(record), record, None)
    print(json.dumps(report.finite(record)))
    return 1 if failed or any(row["red"] for row in rows) else 0


def _measure(one: dict[str, Any], stock: Any, ours: Any, options: Any) -> dict[str, Any]:
    """Both on the requests of one task: a first run of ours, which compiles and records, then pairs."""
    kind, asked = one["kind"], _some(one["requests"], options.documents)
    # Half of them first: what is recorded by size must fit the others.
    _answers(ours, kind, asked)
    _answers(stock, kind, asked[: options.batch])
    before = vars(ours.counts).copy()
    steps = {"stock": list[float](), "ours": list[float]()}
    peaks, answers = {}, {}
    for pair in range(options.pairs):
        for name, lm in (("stock", stock), ("ours", ours))[:: 1 if pair % 2 else -1]:
            seconds, peaks[name], answers[name] = _timed(lm, kind, asked)
            steps[name].append(seconds)
    row = {
        "kind": kind,
        "requests": len(asked),
        "stock_seconds": statistics.median(steps["stock"]),
        "ours_seconds": statistics.median(steps["ours"]),
        "peak_bytes": peaks,
        "counts": {name: (value - before[name]) // options.pairs for name, value in vars(ours.counts).items()},
        "stock_ways": dict(ours.stock_ways),
        **_compared(kind, answers["stock"], answers["ours"]),
    }
    row["ratio"] = row["stock_seconds"] / row["ours_seconds"]
    return {**row, "red": _red(row)}


def _some(requests: list[list[Any]], documents: int) -> list[list[Any]]:
    """The requests of the first documents, which differ in their contexts."""
    contexts = list(dict.fromkeys(context for context, _ in requests))[:documents]
    return [one for one in requests if one[0] in set(contexts)]


class _Instance:
    """What a model reads of lm-evaluation-harness's instances; options of texts are written to."""

    task_name = ""

    def __init__(self, arguments: list[Any]) -> None:
        self.args = tuple(dict(one) if isinstance(one, dict) else one for one in arguments)


def _answers(lm: Any, kind: str, asked: list[list[Any]]) -> list[Any]:
    found: list[Any] = getattr(lm, kind)([_Instance(one) for one in asked], disable_tqdm=True)
    return found


def _timed(lm: Any, kind: str, asked: list[list[Any]]) -> tuple[float, int | None, list[Any]]:
    """Seconds, the peak of memory, and the answers."""
    on_gpu = lm.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = _answers(lm, kind, asked)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if on_gpu else None, found


def _compared(kind: str, theirs: list[Any], ours: list[Any]) -> dict[str, Any]:
    if kind == "generate_until":
        return {"same": sum(a == b for a, b in zip(theirs, ours, strict=True))}
    differences = [a[0] - b[0] for a, b in zip(theirs, ours, strict=True)]
    rms = statistics.fmean(value**2 for value in differences) ** 0.5
    return {
        "same": sum(a[1] == b[1] for a, b in zip(theirs, ours, strict=True)),
        "rms_nats": rms,
        "mean_nats": statistics.fmean(differences),
    }


def _red(row: dict[str, Any]) -> list[str]:
    red = []
    if row["ratio"] < 1:
        red.append(f"ours takes {1 / row['ratio']:.2f} of stock's time")
    counts = row["counts"]
    if counts["computed"] != counts["planned"] or counts["planned"] > (1 + MORE_TOKENS) * counts["distinct"]:
        red.append(f"{counts['computed']} tokens were computed, {counts['distinct']} are distinct")
    if row["stock_ways"]:
        red.append(f"HFLM's own way: {row['stock_ways']}")
    return red


def _briefly(row: dict[str, Any]) -> str:
    counts = row["counts"]
    tokens = f", tokens {counts['computed']} of {counts['asked']} ({counts['distinct']} distinct)" if counts["asked"] else ""
    nats = f", rms {row['rms_nats']:.3g} nats" if "rms_nats" in row else ""
    return (
        f"{row['requests']} requests, stock {row['stock_seconds']:.2f} s, ours {row['ours_seconds']:.2f} s: "
        f"{row['ratio']:.2f} x{tokens}, same {row['same']}{nats}, peaks {row['peak_bytes']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
