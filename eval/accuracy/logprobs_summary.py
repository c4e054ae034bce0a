"""What the differences of `logprobs` say: their distribution, KL, checks with their limits, and the report in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_fastattn.eval.accuracy.draw_costs import draw_checks
from hf_fastattn.eval.accuracy.estimates import Clusters
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

STOCK = "stock"
Windows = list[np.ndarray]

DERIVATION = f"""\
A difference is the log-probability that `generate()` computed of a token less the one of the trainer's forward, which is
stock's, in nats; the importance ratio is `exp(-difference)`. All series score the tokens of one rollout, which stock drew.
- *mean square difference*, over that of stock's own scores: at most {MEAN_SQUARE_FACTOR:.0f}, as much error again as stock
  has (variances add). In some shapes stock's decode and forward are equal to the bit: then the forward's own error stands
  for what they are apart.
- *worst token*: at most {MAXIMUM_FACTOR:.0f} times stock's worst difference, or twice the error of the trainer's forward.
- *KL(generate() || forward)* is estimated by `ratio - 1 - log ratio` (Schulman, 2020, "Approximating KL divergence").
- *drawn tokens*: rows that the device's loop drew for itself, by the exact model, as in parity.
- In batch-invariant mode attention is held to be equal to the bit, in every layer, between decode and forward on equal
  inputs. What then remains between decode and a forward over our pages is due to products and what they feed: at most what
  stock's two ways differ by. Their share is what goes when every linear layer computes in a wider dtype and rounds once.
- Floors: 4 roundings in fp32 of the rms of the exact log-probabilities. Intervals are Student's over {{kind}}."""


def summarise(records: Sequence[dict[str, Any]], documents: Sequence[int], variants: Sequence[Variant]) -> dict[str, Any]:
    """Figures of every series and checks of every variant.

    Args:
        records: of each batch, as `logprobs.measure_batch` makes them.
        documents: the document of each prompt.
        variants: of the patched model, each with a series of its name.
    """
    clusters = Clusters(documents)
    series = {name: _windows(records, lambda record, name=name: record["series"][name]) for name in records[0]["series"]}
    error = _windows(records, lambda record: record["error"])
    floor = FLOOR_EPS * _rms(_windows(records, lambda record: record["size"]))
    rows = [_row(clusters, name, values, series[STOCK]) for name, values in series.items()]
    checks = []
    for variant in variants:
        name, counters = variant.name, [record["counters"][variant.name] for record in records]
        checks.append(path_check(name, counters))
        shares = not variant.alone
        checks += loop_checks(name, counters, shares, compacts=False, alone=variant.alone) if variant.loop else []
        checks += _checks(name, clusters, series[name], series[STOCK], error, floor)
        if variant.loop:
            # A logit may be off by about as much as the trainer's log-probabilities are, at most.
            allowed = MAXIMUM_FACTOR * max(_largest(error), _largest(series[STOCK])) + floor
            checks += draw_checks(name, [record["draws"][name] for record in records], allowed)
    remains = {name: _remains([record["remains"][name] for record in records]) for name in records[0]["remains"]}
    for name, found in remains.items():
        checks.append(Check(name, "layers whose attention is not equal to the bit", found["apart"], 0))
        checks.append(Check(name, "decode less a forward over our pages, rms", found["rms"], _rms(series[STOCK]) + floor))
    return {
        "prompts": len(error),
        "tokens": sum(map(len, error)),
        "units": {"kind": clusters.kind, "count": clusters.count},
        "series": rows,
        "remains": remains,
        "forward_error": {"rms": _rms(error), "largest": _largest(error)},
        "paths": paths([variant.name for variant in variants], [record["counters"] for record in records]),
        "checks": [{**asdict(check), "alarms": check.alarms} for check in checks],
        "planted": sum(counter["planted"] for record in records for counter in record["counters"].values()),
        "verdict": verdict(checks),
    }


def _windows(records: Sequence[dict[str, Any]], pick: Any) -> Windows:
    return [np.array(row, float) for record in records for row in pick(record)]


def _row(clusters: Clusters, name: str, values: Windows, stock: Windows) -> dict[str, Any]:
    every = np.concatenate(values)
    log_ratio = -every
    ratio = np.exp(log_ratio)
    size, relative = np.abs(every), clusters.ratio_of_squares(values, stock)
    return {
        "series": name,
        "mean": float(every.mean()),
        "rms": _rms(values),
        "quantiles": [float(np.quantile(size, share)) for share in (0.5, 0.9, 0.99, 1.0)],
        "kl": float((ratio - 1 - log_ratio).mean()),
        "ratio": [float(ratio.min()), float(ratio.max())],
        "relative": relative.value,
        "relative_interval": list(relative.interval()),
    }


def _checks(name: str, clusters: Clusters, ours: Windows, stock: Windows, error: Windows, floor: float) -> list[Check]:
    peer = stock if _rms(stock) > 0 else error
    relative = clusters.ratio_of_squares(ours, peer)
    limit = MEAN_SQUARE_FACTOR + (floor / max(_rms(peer), 1e-150)) ** 2
    worst = MAXIMUM_FACTOR * max(_largest(stock), _largest(error)) + floor
    return [
        Check(name, "mean square difference / stock's", relative.value, limit),
        Check(name, "worst token, nats", _largest(ours), worst),
    ]


def _remains(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is left in batch-invariant mode, over all batches."""
    squares, without = (sum(part[name] for part in parts) for name in ("squares", "without_products"))
    tokens, layers = sum(part["tokens"] for part in parts), len(parts[0]["layers"])
    apart = sum(any(part["layers"][layer] for part in parts) for layer in range(layers))
    return {
        "layers": layers,
        "apart": apart,
        "rms": math.sqrt(squares / tokens),
        "rms_without_products": math.sqrt(without / tokens),
        "share_of_products": 1 - without / squares if squares else 0.0,
    }


def _rms(windows: Windows) -> float:
    return float(np.sqrt(np.mean(np.concatenate(windows) ** 2)))


def _largest(windows: Windows) -> float:
    values = np.abs(np.concatenate(windows))
    return float(values.max()) if np.isfinite(values).all() else math.nan


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    settings, units = record["settings"], record["units"]
    fault = ""
    if settings["inject"]:
        fault = f", fault **{settings['inject']}** planted ({record['planted']:,} times in force)"
    lines = [
        f"# Log-probabilities of generate() and of a later forward: {record['verdict']}{fault}",
        "",
        f"{settings['model']}, {settings['dtype']}, {settings['data']}: {record['prompts']} prompts of at most "
        f"{settings['context']} tokens, {settings['samples']} answers of {settings['new']} tokens each, drawn at "
        f"temperature 1 from the {settings['top_k']} likeliest: {record['tokens']:,} tokens; {units['count']} "
        f"{units['kind']}; seed {settings['seed']}. The trainer's forward itself is off by "
        f"{record['forward_error']['rms']:.2e} (rms).",
        "",
        "| difference, nats | rms | mean | median | 90% | 99% | largest | KL | ratio, least and greatest "
        "| mean square / stock's (95%) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["series"]:
        quantiles = " | ".join(f"{value:.1e}" for value in row["quantiles"])
        low, high = row["relative_interval"]
        own = row["series"] == STOCK
        relative = "1" if own else f"{row['relative']:.3f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"| {row['series']} | {row['rms']:.2e} | {row['mean']:+.1e} | {quantiles} | {row['kl']:.1e} "
            f"| {row['ratio'][0]:.6f} {row['ratio'][1]:.6f} | {relative} |"
        )
    for name, found in record["remains"].items():
        lines += [
            "",
            f"- {name}: attention of decode and of a forward differs in {found['apart']} of {found['layers']} layers on "
            f"equal inputs. Between decode and a forward over our pages {found['rms']:.2e} nats (rms) remain, "
            f"{found['rms_without_products']:.2e} with products that round once: products make "
            f"{found['share_of_products']:.1%} of the mean square.",
        ]
    lines += ["", *record["paths"]]
    checks = [Check(*(check[f] for f in ("variant", "name", "value", "limit", "note"))) for check in record["checks"]]
    lines += ["", "## Checks", "", table(checks), "", DERIVATION.format(kind=units["kind"]), "", environment_lines(record)]
    return "\n".join(lines)
