"""Scores of stock and patched side by side: paired differences over documents, checks, and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_fastattn.eval.accuracy.estimates import ALARM_LEVEL, Estimate, ratio
from hf_fastattn.eval.accuracy.verdict import Check, table, verdict
from hf_fastattn.eval.reporting import report

# Nats that the log-likelihood of a request may differ by in fp32.
MOST_NATS = 1e-3
# Tokens computed beyond the distinct ones, as a share, that a forward less may cost.
MORE_TOKENS = 0.05


def compare(task: str, stock: dict[str, Any], ours: dict[str, Any], exact: bool) -> dict[str, Any]:
    """One task: its metrics with standard errors and paired differences, and how answers differ.

    Args:
        stock, ours: results of `lm_eval.simple_evaluate`, with samples.
        exact: the model computes in fp32, where answers have to be equal.
    """
    samples = [sorted(one["samples"][task], key=_place) for one in (stock, ours)]
    metrics = []
    for key, value in stock["results"][task].items():
        name, _, way = key.partition(",")
        if not way or name.endswith("_stderr"):
            continue
        error = stock["results"][task].get(f"{name}_stderr,{way}")
        difference = _paired(*([one[name] for one in side if one.get("filter", way) == way] for side in samples))
        found = {"metric": name, "stock": float(value), "stderr": error if isinstance(error, float) else math.nan}
        found |= {"ours": float(ours["results"][task][key]), "difference": difference.value, "difference_se": difference.se}
        metrics.append(found)
    answers = [[answer for one in side for answer in _flat(one["resps"])] for side in samples]
    entry = {"task": task, "documents": len({_place(one) for one in samples[0]}), "metrics": metrics}
    entry |= _answers(*answers)
    return {**entry, "checks": [asdict(check) | {"alarms": check.alarms} for check in _checks(entry, exact)]}


def _place(sample: dict[str, Any]) -> int:
    place: int = sample["doc_id"]
    return place


def _flat(answers: Any) -> list[Any]:
    """The answers of a document, whatever lists they lie in."""
    if isinstance(answers, list):
        return [answer for one in answers for answer in _flat(one)]
    return [answers]


def _paired(theirs: Sequence[Any], ours: Sequence[Any]) -> Estimate:
    """Ours minus theirs a document; of sums with weights, a unit of the weight."""
    if theirs and isinstance(theirs[0], tuple | list):
        return ratio([b[0] - a[0] for a, b in zip(theirs, ours, strict=True)], [a[1] for a in theirs])
    return ratio([float(b) - float(a) for a, b in zip(theirs, ours, strict=True)], np.ones(len(theirs)))


def _answers(theirs: list[Any], ours: list[Any]) -> dict[str, Any]:
    if theirs and isinstance(theirs[0], str):
        differ = sum(a != b for a, b in zip(theirs, ours, strict=True))
        return {"kind": "texts", "answers": len(theirs), "differ": differ}
    pairs = [(a[0], b[0]) if isinstance(a, tuple) else (a, b) for a, b in zip(theirs, ours, strict=True)]
    nats = [b - a for a, b in pairs]
    mean = ratio(nats, np.ones(len(nats)))
    found = {"kind": "log-likelihoods", "answers": len(nats), "largest_nats": max(map(abs, nats))}
    found["largest_sum"] = max(abs(a) for a, _ in pairs)
    return found | {"mean_nats": mean.value, "mean_nats_se": mean.se}


def _checks(entry: dict[str, Any], exact: bool) -> list[Check]:
    task, checks = entry["task"], []
    for metric in entry["metrics"]:
        name = f"difference of {metric['metric']}"
        checks.append(_within(task, name, Estimate(metric["difference"], metric["difference_se"], entry["documents"])))
    if entry["kind"] == "texts":
        return [*checks, Check(task, "texts that differ", entry["differ"], 0)] if exact else checks
    if exact:
        # A sum over a long text is rounded by its own size.
        limit = MOST_NATS * max(1.0, entry["largest_sum"] / 1000)
        return [*checks, Check(task, "largest difference of a log-likelihood, nats", entry["largest_nats"], limit)]
    mean = Estimate(entry["mean_nats"], entry["mean_nats_se"], entry["answers"])
    return [*checks, _within(task, "mean difference of log-likelihoods, nats", mean)]


def _within(task: str, name: str, found: Estimate) -> Check:
    """A mean that is no further from 0 than chance takes it; where nothing varies, than rounding does."""
    low, high = found.interval(ALARM_LEVEL)
    half = (high - low) / 2 if math.isfinite(high - low) else 0.0
    return Check(task, name, abs(found.value), max(half, 1e-6))


def path_checks(counts: dict[str, int], stock_ways: dict[str, int], batch_steps: int, texts: bool) -> list[dict[str, Any]]:
    """Whether our own path served all requests, and computed each distinct token about once."""
    reasons = "; ".join(sorted(stock_ways))
    checks = [Check("all", "requests that ran HFLM's own way", sum(stock_ways.values()), 0, reasons)]
    if counts["distinct"]:
        more = counts["computed"] / counts["distinct"] - 1
        checks.append(Check("all", "tokens computed beyond the distinct ones, share", more, MORE_TOKENS))
        checks.append(Check("all", "tokens computed that were not planned", abs(counts["computed"] - counts["planned"]), 0))
    if texts:
        checks.append(Check("all", "texts without a running batch", 0 if batch_steps else 1, 0))
    return [asdict(check) | {"alarms": check.alarms} for check in checks]


def all_checks(record: dict[str, Any]) -> list[Check]:
    """Of all tasks and of the path."""
    found = [check for entry in record["tasks"] for check in entry["checks"]] + record["path"]
    return [Check(*(check[name] for name in ("variant", "name", "value", "limit", "note"))) for check in found]


def verdict_of(record: dict[str, Any]) -> str:
    """`green` or `red`."""
    return verdict(all_checks(record))


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    counts, seconds = record["counts"], record["task_seconds"]
    lines = [
        f"# Tasks of lm-evaluation-harness: {record['verdict']}",
        "",
        "Stock is the harness's own `HFLM`, ours `FastLM` (`--model hf-fastattn`) on the same weights. Standard errors are "
        "the harness's; differences are paired, document by document.",
        "",
        "| task | metric | stock | ours | difference | answers | differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in record["tasks"]:
        differ = f"{entry['differ']} texts" if entry["kind"] == "texts" else f"by {entry['largest_nats']:.1e} nats at most"
        for metric in entry["metrics"]:
            error = f" ± {metric['stderr']:.3f}" if math.isfinite(metric["stderr"]) else ""
            lines.append(
                f"| {entry['task']} | {metric['metric']} | {metric['stock']:.4g}{error} | {metric['ours']:.4g}{error} "
                f"| {metric['difference']:+.1e} ± {metric['difference_se']:.1e} | {entry['answers']} | {differ} |"
            )
    lines += ["", f"Log-likelihoods: {counts['asked']:,} tokens in all requests, {counts['distinct']:,} of them distinct, "
              f"{counts['computed']:,} computed in {counts['forwards']} forwards."]  # fmt: skip
    lines += ["", "| task | stock, s | ours, s |", "|---|---|---|"]
    lines += [f"| {task} | {one['stock']:.1f} | {one['ours']:.1f} |" for task, one in seconds.items()]
    lines += ["", table(all_checks(record)), "", report.environment_lines(record)]
    return "\n".join(lines)


def draw(plt: Any, record: dict[str, Any]) -> Any:
    """The scores of both with their standard errors, and the seconds that each task took."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.0, 3.4), constrained_layout=True)
    figure.suptitle("Tasks of lm-evaluation-harness, stock and patched", fontsize=11)
    rows = [(entry["task"], metric) for entry in record["tasks"] for metric in entry["metrics"] if metric["stock"] <= 1]
    for place, (_, metric) in enumerate(rows):
        for shift, side, colour in ((-0.15, "stock", "#4f5b66"), (0.15, "ours", "#1f77b4")):
            error = metric["stderr"] if isinstance(metric["stderr"], float) and math.isfinite(metric["stderr"]) else 0.0
            left.errorbar(100 * metric[side], place + shift, xerr=100 * error, fmt="o", color=colour, markersize=5)
    left.set_yticks(range(len(rows)), [f"{_plain(task)}\n{_plain(metric['metric'])}" for task, metric in rows])
    left.invert_yaxis()
    left.set_xlabel("score, %, with its standard error", fontsize=9)
    names = list(record["task_seconds"])
    for shift, side, colour in ((-0.2, "stock", "#4f5b66"), (0.2, "ours", "#1f77b4")):
        values = [record["task_seconds"][name][side] for name in names]
        right.barh([place + shift for place in range(len(names))], values, 0.36, color=colour, label=_plain(side))
    right.set_yticks(range(len(names)), [_plain(name) for name in names])
    right.invert_yaxis()
    right.set_xlabel("seconds, lower is better", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", color="#eeeeee")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _plain(name: str) -> str:
    return {"ours": "patched"}.get(name, name.removeprefix("fastattn_").replace("_", " "))
