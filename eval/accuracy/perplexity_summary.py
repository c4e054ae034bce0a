"""What the losses of `perplexity` say: estimates, checks with their limits, and the report in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_fastattn.eval.accuracy.estimates import ALARM_LEVEL, Clusters, Estimate
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
from hf_fastattn.eval.reporting.report import environment_lines

Windows = list[np.ndarray]
PHASES = ("prefill", "append", "decode")
# Stock as it is, where that of the checks rounds keys and values.
NOTHING_ROUNDED = "stock, nothing rounded"

DERIVATION = f"""\
Errors are differences from the exact model, in nats a token. Stock errs too, by rounding, and how much depends on how
the work is cut: the limits come from stock itself, in one forward and in pieces.
- *mean square error*, over that of stock in pieces: at most {MEAN_SQUARE_FACTOR:.0f} times what stock in one forward
  shows against stock in pieces (at least 1; upper end of its {ALARM_LEVEL:.1%} interval). Variances add, so the limit
  is as much error again as stock's own.
- *worst token*: at most {MAXIMUM_FACTOR:.0f} times stock's worst (FlashAttention's criterion), of both ways.
- *mean difference from stock*: alarms if its whole {ALARM_LEVEL:.1%} interval lies outside a band of twice stock's own
  mean error (upper end of its {ALARM_LEVEL:.1%} interval, the larger of both ways). The value shown is the interval's
  end nearest to zero.
- A floor of 4 roundings in fp32 is added to each. Intervals are Student's over {{kind}}."""


def summarise(records: Sequence[dict[str, Any]], documents: Sequence[int], variants: Sequence[Variant]) -> dict[str, Any]:
    """Estimates of every series and checks of every variant.

    Args:
        records: of each batch, as `perplexity.score_batch` makes them.
        documents: the document of each window.
        variants: of the patched model, each with a series of its name.
    """
    clusters = Clusters(documents)
    names = list(records[0]["series"])
    series = {name: [np.array(row, float) for record in records for row in record["series"][name]] for name in names}
    exact, stock = series["exact"], series["stock"]
    errors = {name: _minus(windows, exact) for name, windows in series.items()}
    phases = [record["phases"] for record in records for _ in record["series"]["exact"]]
    rows = []
    for name in names:
        rows.append({"series": name, **_loss(clusters, series[name], stock)})
        rows[-1]["rms_error"] = _rms(errors[name])
        rows[-1]["worst_error"] = _largest(errors[name])
        rows[-1]["rms_by_phase"] = _by_phase(errors[name], phases)
    checks = []
    for variant in variants:
        name = variant.name
        counters = [record["counters"][name] for record in records]
        checks.append(path_check(name, counters))
        checks += loop_checks(name, counters, variant.share, variant.share, variant.alone) if variant.loop else []
        checks += _checks(name, clusters, errors, _minus(series[name], stock), _rms(exact))
    return {
        "tokens": int(sum(map(len, exact))),
        "windows": len(exact),
        "units": {"kind": clusters.kind, "count": clusters.count},
        "series": rows,
        "band": _band(clusters, errors),
        "paths": paths([variant.name for variant in variants], [record["counters"] for record in records]),
        "checks": [{**asdict(check), "alarms": check.alarms} for check in checks],
        "planted": sum(counter["planted"] for record in records for counter in record["counters"].values()),
        "verdict": verdict(checks),
    }


def _loss(clusters: Clusters, losses: Any, stock: Any) -> dict[str, Any]:
    """Loss, perplexity and difference to stock's losses of one series, with standard errors."""
    loss, difference = clusters.mean(losses), clusters.mean(_minus(losses, stock))
    return {
        "loss": loss.value,
        "loss_se": loss.se,
        "perplexity": _exp(loss.value),
        "perplexity_se": _exp(loss.value) * loss.se,
        "difference": difference.value,
        "difference_se": difference.se,
        "difference_interval": list(difference.interval()),
    }


def _checks(name: str, clusters: Clusters, errors: dict[str, Windows], difference: Windows, size: float) -> list[Check]:
    ours, stock, one = errors[name], errors["stock"], errors["stock, one forward"]
    floor = FLOOR_EPS * size
    null = clusters.ratio_of_squares(one, stock).interval(ALARM_LEVEL)[1]
    spread = clusters.ratio_of_squares(ours, stock)
    limit = MEAN_SQUARE_FACTOR * max(1.0, null if math.isfinite(null) else 1.0) + (floor / max(_rms(stock), 1e-300)) ** 2
    worst = MAXIMUM_FACTOR * max(_largest(stock), _largest(one)) + floor
    mean = clusters.mean(difference)
    return [
        Check(name, "mean square error / stock's", spread.value, limit),
        Check(name, "worst token, nats", _largest(ours), worst),
        Check(name, "mean difference from stock, nats", _nearest_to_zero(mean), _band(clusters, errors) + floor),
    ]


def _band(clusters: Clusters, errors: dict[str, Windows]) -> float:
    """Twice stock's own mean error, as far as that is known."""
    ends = []
    for way in ("stock", "stock, one forward"):
        mean = clusters.mean(errors[way])
        ends.append(mean.largest() if math.isfinite(mean.se) else abs(mean.value))
    return MAXIMUM_FACTOR * max(ends)


def _nearest_to_zero(mean: Estimate) -> float:
    """The smallest magnitude in the alarm interval: 0 if it holds 0. NaN stays NaN."""
    if not math.isfinite(mean.se):
        return abs(mean.value)
    low, high = mean.interval(ALARM_LEVEL)
    return max(low, -high, 0.0) if math.isfinite(low) else math.nan


def _minus(windows: Windows, others: Windows) -> Windows:
    return [a - b for a, b in zip(windows, others, strict=True)]


def _rms(windows: Windows) -> float:
    return float(np.sqrt(np.mean(np.concatenate(windows) ** 2)))


def _largest(windows: Windows) -> float:
    values = np.abs(np.concatenate(windows))
    return float(values.max()) if np.isfinite(values).all() else math.nan


def _by_phase(windows: Windows, phases: Sequence[dict[str, int]]) -> dict[str, float]:
    """Root mean square error of the tokens that each phase predicted."""
    parts: dict[str, list[np.ndarray]] = {phase: [] for phase in PHASES}
    for values, begin in zip(windows, phases, strict=True):
        # Rows end together: a phase's tokens are counted from the end.
        append, decode = (max(len(values) - begin[phase], 0) for phase in ("append", "decode"))
        for phase, part in zip(PHASES, (values[:append], values[append:decode], values[decode:]), strict=True):
            parts[phase].append(part)
    joined = {phase: np.concatenate(found) for phase, found in parts.items()}
    return {phase: float(np.sqrt(np.mean(values**2))) for phase, values in joined.items() if len(values)}


def _format_cost(record: dict[str, Any]) -> list[str]:
    """What rounding keys and values costs, if that is done, as a line."""
    wide = next((row for row in record["series"] if row["series"] == NOTHING_ROUNDED), None)
    if wide is None:
        return []
    low, high = wide["difference_interval"]
    cost, least, most = (100 * math.expm1(-nats) for nats in (wide["difference"], high, low))
    rounding = f"Rounding keys and values to {record['settings']['kv_dtype']} costs"
    return ["", f"{rounding} {cost:+.3f}% of perplexity (95%: {least:+.3f}% to {most:+.3f}%)."]


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    settings, units = record["settings"], record["units"]
    fault = ""
    if settings["inject"]:
        fault = f", fault **{settings['inject']}** planted ({record['planted']:,} times in force)"
    lines = [
        f"# Perplexity: {record['verdict']}{fault}",
        "",
        f"{settings['model']}, {settings['dtype']}, {settings['data']}: {record['tokens']:,} tokens in {record['windows']} "
        f"windows of {settings['context']} (stride {settings['stride']}), {units['count']} {units['kind']}; "
        f"seed {settings['seed']}. Standard errors are over {units['kind']}.",
        "",
        "| | perplexity | nats a token | difference from stock in pieces, nats (95%) | rms error | worst token |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["series"]:
        low, high = row["difference_interval"]
        apart = "" if row["series"] == "stock" else f"{row['difference']:+.2e} ({low:+.1e} to {high:+.1e})"
        error = ("", "") if row["series"] == "exact" else (f"{row['rms_error']:.2e}", f"{row['worst_error']:.2e}")
        lines.append(
            f"| {row['series']} | {row['perplexity']:.4f} ± {row['perplexity_se']:.2f} "
            f"| {row['loss']:.6f} ± {row['loss_se']:.3f} | {apart} | {error[0]} | {error[1]} |"
        )
    stock = next(row for row in record["series"] if row["series"] == "stock")
    lines += _format_cost(record)
    lines += [
        "",
        f"Stock's band for the mean difference is ±{record['band']:.1e} nats. Without pairing, a difference of "
        f"{2 * math.sqrt(2) * stock['loss_se']:.2f} nats would go unnoticed (two standard errors of two independent "
        "estimates).",
        "",
        "| rms error by phase | " + " | ".join(PHASES) + " |",
        "|---|" + "---|" * len(PHASES),
    ]
    for row in record["series"][1:]:
        shown = (f"{row['rms_by_phase'][p]:.2e}" if p in row["rms_by_phase"] else "" for p in PHASES)
        lines.append(f"| {row['series']} | " + " | ".join(shown) + " |")
    checks = [Check(*(check[f] for f in ("variant", "name", "value", "limit", "note"))) for check in record["checks"]]
    lines += ["", *record["paths"]]
    lines += ["", "## Checks", "", table(checks), "", DERIVATION.format(kind=units["kind"]), "", environment_lines(record)]
    return "\n".join(lines)
