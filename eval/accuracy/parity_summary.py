"""What the errors of `parity` say: figures of each series, checks with their limits, and the report in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_fastattn.eval.accuracy.estimates import ALARM_LEVEL, Clusters, ratio
from hf_fastattn.eval.accuracy.parity_errors import FIGURES
from hf_fastattn.eval.accuracy.parity_loop import parity_loop_checks
from hf_fastattn.eval.accuracy.variants import Variant
from hf_fastattn.eval.accuracy.verdict import (
    FLOOR_EPS,
    MAXIMUM_FACTOR,
    MEAN_SQUARE_FACTOR,
    Check,
    loop_checks,
    path_check,
    paths,
    table,
    verdict,
)
from hf_fastattn.eval.accuracy.windows import WindowBatch
from hf_fastattn.eval.reporting.report import environment_lines

ONE, STOCK = "stock, one forward", "stock"
GREEDY_FIGURES = ("entries", "squares", "max", "regret", "parted", "margin")

DERIVATION = f"""\
Errors are differences from the exact model. Stock errs too, by rounding, and how much depends on how the work is cut:
the limits come from stock itself, in one forward and in pieces.
- *mean square* checks and mean KL, over stock's in pieces: at most {MEAN_SQUARE_FACTOR:.0f} times what stock in one
  forward shows against stock in pieces (at least 1; upper end of its {ALARM_LEVEL:.1%} interval over {{kind}}).
  Variances add, so the limit is as much error again as stock's own. KL is second order in the error of the logits, so
  it gets the same factor.
- *largest* checks: at most {MAXIMUM_FACTOR:.0f} times stock's largest, of both ways (FlashAttention's criterion).
- *regret*: what the exact logits lose by our top choice. If no logit is off by more than its limit, it's at most twice
  that: a choice, or a parting of the greedy paths, with less regret is a tie that rounding decides.
- Hidden states: the norm of the error over that of the exact state, of each token and layer; the layer nearest its limit
  is shown.
- *loop* checks: the same of log-probabilities that recorded steps compute of forced tokens. A regret is of the tokens that
  these steps would have taken, and of those that a greedy call took.
- *drawn tokens*: what they cost, against what tokens drawn by the exact logits cost on average, and how far a logit may
  fall short of those that may be drawn at all.
- Floors: 4 roundings in fp32, of the exact logits (their rms, or the largest) and hidden states."""


class Series:
    """The figures of one series, a value a window."""

    def __init__(self, records: Sequence[dict[str, Any]], name: str) -> None:
        parts = [record["series"][name] for record in records]
        self.name = name
        self.figures = {key: np.array([v for part in parts for v in part[key]], float) for key in FIGURES}
        # [layers, windows]
        self.layer_squares = np.concatenate([np.array(part["layer_squares"], float) for part in parts], 1)
        self.layer_max = np.concatenate([np.array(part["layer_max"], float) for part in parts], 1)
        self.greedy: dict[str, list[Any]] = {}
        if "greedy" in parts[0]:
            self.greedy = {key: [v for part in parts for v in part["greedy"][key]] for key in GREEDY_FIGURES}

    def row(self, tokens: np.ndarray) -> dict[str, Any]:
        """What the report shows; `tokens` are those of each window."""
        f = self.figures
        parted = [step for step in self.greedy.get("parted", []) if step is not None]
        return {
            "series": self.name,
            "max_error": f["max"].max(),
            "mean_error": f["absolute"].sum() / f["entries"].sum(),
            "rms_error": math.sqrt(f["squares"].sum() / f["entries"].sum()),
            "mean_kl": f["kl"].sum() / f["tokens"].sum(),
            "max_kl": f["kl_max"].max(),
            "top1": f["agree"].sum() / f["tokens"].sum(),
            "regret": f["regret"].max(),
            "layer_rms": np.sqrt(self.layer_squares.sum(1) / tokens.sum()).tolist(),
            "layer_max": self.layer_max.max(1).tolist(),
            "greedy_max": max(self.greedy["max"]) if self.greedy else None,
            "parted": len(parted),
            "earliest": min(parted) if parted else None,
            "margin": max(self.greedy["margin"]) if self.greedy else None,
        }


def summarise(
    records: Sequence[dict[str, Any]], batches: Sequence[WindowBatch], variants: Sequence[Variant], tokenizer: Any
) -> dict[str, Any]:
    """Figures of every series, checks of every variant, and the first layer and token of each that is wrong."""
    windows = [window for batch in batches for window in batch.windows]
    clusters = Clusters([window.document for window in windows])
    tokens = np.array([len(window.ids) for window in windows], float)
    series = {name: Series(records, name) for name in records[0]["series"]}
    checks: list[Check] = []
    first: dict[str, str] = {}
    loops: dict[str, dict[str, Any]] = {}
    for variant in variants:
        name = variant.name
        counters = [record["counters"][name] for record in records]
        own = [path_check(name, counters)]
        if variant.loop:
            parts = [record["loops"][name] for record in records]
            loops[name] = _loop_row(parts)
            own += [
                *loop_checks(name, counters, variant.share, variant.share, variant.alone),
                *_loop_checks(name, parts, records, series, clusters),
            ]
        else:
            own += _checks(series[name], series[STOCK], series[ONE], clusters)
        checks += own
        if not variant.loop and any(check.alarms for check in own):
            first[name] = _first(records, batches, name, tokenizer)
    return {
        "windows": len(windows),
        "tokens": int(tokens.sum()),
        "scored": int(series[STOCK].figures["tokens"].sum()),
        "units": {"kind": clusters.kind, "count": clusters.count},
        "series": [one.row(tokens) for one in series.values()],
        "checks": [{**asdict(check), "alarms": check.alarms} for check in checks],
        "first_wrong": first,
        "loops": loops,
        "paths": paths([variant.name for variant in variants], [record["counters"] for record in records]),
        "planted": sum(counter["planted"] for record in records for counter in record["counters"].values()),
        "verdict": verdict(checks),
    }


def _loop_row(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the report shows of a variant in the device's loop."""
    errors = np.array([error for part in parts for window in part["errors"] for error in window], float)
    return {
        "tokens": len(errors),
        "rms_error": float(np.sqrt(np.mean(errors**2))),
        "largest_error": float(np.abs(errors).max()),
        "regret": max(max(part["regret"], part["greedy_regret"]) for part in parts),
        "parted": sum(part["parted"] for part in parts),
        "drawn": sum(part["draws"]["tokens"] for part in parts),
    }


def _loop_checks(
    name: str,
    parts: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    series: dict[str, Series],
    clusters: Clusters,
) -> list[Check]:
    stock = [record["logprobs"] for record in records]
    size = float(np.sqrt(np.mean([value**2 for part in stock for window in part["size"] for value in window])))
    return parity_loop_checks(name, parts, stock, clusters, _largest_allowed(series[STOCK], series[ONE]), size)


def _largest_allowed(stock: Series, one: Series) -> float:
    """By how much a logit may be off."""
    floor = FLOOR_EPS * float(stock.figures["largest"].max())
    return MAXIMUM_FACTOR * float(max(stock.figures["max"].max(), one.figures["max"].max())) + floor


def _checks(ours: Series, stock: Series, one: Series, clusters: Clusters) -> list[Check]:
    def square_limit(pick: Callable[[Series], np.ndarray], floor: float) -> tuple[float, float]:
        """Ours over stock's, and the limit; `floor` is a sum of squares a window."""

        def sums(series: Series) -> np.ndarray:
            return np.bincount(clusters.unit, pick(series), minlength=clusters.count)

        null = ratio(sums(one), sums(stock)).interval(ALARM_LEVEL)[1]
        total = max(float(sums(stock).sum()), 1e-300)
        limit = MEAN_SQUARE_FACTOR * max(1.0, null if math.isfinite(null) else 1.0) + floor * len(clusters.unit) / total
        return float(sums(ours).sum()) / total, limit

    floor = FLOOR_EPS * float(stock.figures["largest"].max())
    size = FLOOR_EPS**2 * float(stock.figures["exact_squares"].mean())
    mean_square = square_limit(lambda s: s.figures["squares"], size)
    # An error of variance e^2 in the logits moves KL by e^2 / 2 at most.
    entries = float(stock.figures["entries"].sum() / stock.figures["tokens"].sum())
    kl = square_limit(lambda s: s.figures["kl"], size / entries / 2)
    largest = _largest_allowed(stock, one)
    greedy = MAXIMUM_FACTOR * max(max(stock.greedy["max"]), stock.figures["max"].max(), one.figures["max"].max()) + floor
    checks = [
        Check(ours.name, "logits, mean square / stock's", *mean_square),
        Check(ours.name, "logits, largest error", _max(ours.figures["max"]), largest),
        Check(ours.name, "mean KL / stock's", *kl),
        Check(ours.name, "top choice, largest regret", _max(ours.figures["regret"]), 2 * largest),
        Check(ours.name, "generate(), largest logit error", _max(np.array(ours.greedy["max"])), float(greedy)),
        Check(ours.name, "generate(), largest regret", _max(np.array(ours.greedy["regret"])), float(2 * greedy)),
    ]
    layers = range(len(stock.layer_squares))
    positions = float(stock.figures["tokens"].mean())
    means = [square_limit(lambda s, i=i: s.layer_squares[i], FLOOR_EPS**2 * positions) for i in layers]  # type: ignore[misc]
    tops = [
        (_max(ours.layer_max[i]), MAXIMUM_FACTOR * max(stock.layer_max[i].max(), one.layer_max[i].max()) + FLOOR_EPS)
        for i in layers
    ]
    for name, pairs in (("hidden states, mean square / stock's", means), ("hidden states, largest error", tops)):
        layer = max(layers, key=lambda i: math.inf if math.isnan(pairs[i][0]) else pairs[i][0] / pairs[i][1])
        checks.append(Check(ours.name, name, float(pairs[layer][0]), float(pairs[layer][1]), f"layer {layer}"))
    return checks


def _max(values: np.ndarray) -> float:
    return float(values.max()) if np.isfinite(values).all() else math.nan


def _first(records: Sequence[dict[str, Any]], batches: Sequence[WindowBatch], name: str, tokenizer: Any) -> str:
    """In words: the first layer in which a token is beyond its limit, and the first such token of the first batch."""
    found = [(record["series"][name]["first"], i) for i, record in enumerate(records) if record["series"][name]["first"]]
    if not found:
        return "no hidden state is beyond its limit; the fault shows in `generate()` or in means only"
    place, index = min(found, key=lambda item: (item[0]["layer"], item[1]))
    record = records[index]
    column = place["column"]
    phase = "prefill" if column < record["split"] else "append" if column < record["done"] else "decode"
    return (
        f"layer {place['layer']}, token {place['position']} ({tokenizer.decode([place['token']])!r}, {phase}) of row "
        f"{place['row']} in batch {index} (document {batches[index].windows[place['row']].document}): relative error "
        f"{place['error']:.2e}, limit {place['limit']:.2e}"
    )


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    settings, units = record["settings"], record["units"]
    fault = ""
    if settings["inject"]:
        fault = f", fault **{settings['inject']}** planted ({record['planted']:,} times in force)"
    exact = "fp64" if settings["dtype"] == "float32" else "fp32"
    lines = [
        f"# Parity: {record['verdict']}{fault}",
        "",
        f"{settings['model']}, {settings['dtype']} against {exact}, {settings['data']}: {record['windows']} prompts of at "
        f"most {settings['context']} tokens, {record['scored']:,} tokens' logits, {record['tokens']:,} tokens' hidden "
        f"states, {settings['new']} new tokens each; {units['count']} {units['kind']}; seed {settings['seed']}.",
        "",
        "| | largest logit error | mean | rms | mean KL | largest KL | top-1 "
        "| greedy paths that leave stock's | earliest | margin |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["series"]:
        parted = "" if row["margin"] is None or row["series"] == STOCK else f"{row['parted']} of {record['windows']}"
        earliest = "" if row["earliest"] is None else f"token {row['earliest'] + 1}"
        margin = f"{row['margin']:.1e}" if row["earliest"] is not None else ""
        lines.append(
            f"| {row['series']} | {row['max_error']:.2e} | {row['mean_error']:.2e} | {row['rms_error']:.2e} "
            f"| {row['mean_kl']:.1e} | {row['max_kl']:.1e} | {row['top1']:.2%} | {parted} | {earliest} | {margin} |"
        )
    lines += ["", "Top-1: tokens whose likeliest successor is the exact model's.", ""]
    layers = len(record["series"][0]["layer_rms"])
    lines += [
        "| relative error of hidden states, rms | " + " | ".join(f"layer {i}" for i in range(layers)) + " |",
        "|---|" + "---|" * layers,
    ]
    lines += [f"| {row['series']} | " + " | ".join(f"{e:.1e}" for e in row["layer_rms"]) + " |" for row in record["series"]]
    if record["first_wrong"]:
        lines += ["", "## First wrong layer and token", ""]
        lines += [f"- {name}: {place}" for name, place in record["first_wrong"].items()]
    lines += _loop_lines(record)
    lines += ["", *record["paths"]]
    checks = [Check(*(check[f] for f in ("variant", "name", "value", "limit", "note"))) for check in record["checks"]]
    lines += ["", "## Checks", "", table(checks), "", DERIVATION.format(kind=units["kind"]), "", environment_lines(record)]
    return "\n".join(lines)


def _loop_lines(record: dict[str, Any]) -> list[str]:
    if not record["loops"]:
        return []
    lines = [
        "",
        "| the device's loop | forced tokens | rms error of their log-probabilities | largest | largest regret of a choice "
        "| greedy paths that leave stock's | drawn tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in record["loops"].items():
        lines.append(
            f"| {name} | {row['tokens']:,} | {row['rms_error']:.2e} | {row['largest_error']:.2e} | {row['regret']:.1e} "
            f"| {row['parted']} of {record['windows']} | {row['drawn']:,} |"
        )
    return lines
