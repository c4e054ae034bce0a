"""The pictures of the evaluations. Each function takes `matplotlib.pyplot` and returns a figure."""

from __future__ import annotations

import math
from typing import Any

STOCK_COLOURS = ("#8d99a6", "#4f5b66")
OUR_COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#17becf", "#bcbd22", "#8c564b")
BAND_COLOUR, ALARM_COLOUR = "#dde3e8", "#d62728"
MARKERS = "s^Dv<>PphX"
LEAST_SHARE = 1e-3


def draw_perplexity(plt: Any, record: dict[str, Any]) -> Any:
    """Left: the paired differences with their intervals, over stock's band. Right: rms error by phase."""
    rows = [row for row in record["series"] if row["series"] not in ("exact", "stock")]
    colours = _colours(record)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 2.2 + 0.42 * max(len(rows), 5)), constrained_layout=True)
    figure.suptitle(_title("Perplexity", record))
    largest = max([record["band"], *(abs(end) for row in rows for end in row["difference_interval"] if math.isfinite(end))])
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    unit = 10.0**power
    left.axvspan(-record["band"] / unit, record["band"] / unit, color=BAND_COLOUR, label="twice stock's own mean error")
    left.axvline(0, color="black", linewidth=0.8)
    for height, row in enumerate(reversed(rows)):
        low, high = (end / unit for end in row["difference_interval"])
        left.plot([low, high], [height, height], color=colours[row["series"]], linewidth=2.5, solid_capstyle="butt")
        left.plot(row["difference"] / unit, height, "o", color=colours[row["series"]])
    left.set_yticks(range(len(rows)), [_wrapped(row["series"]) for row in reversed(rows)])
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set_xlabel(f"difference from stock in pieces, $10^{{{power}}}$ nats a token, 95% interval")
    left.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)
    _bars(right, [row for row in record["series"] if row["series"] != "exact"], colours, bool(_alarmed(record)))
    return figure


def _bars(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str], logarithmic: bool) -> None:
    phases = [phase for phase in ("prefill", "append", "decode") if any(phase in row["rms_by_phase"] for row in rows)]
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        heights = [row["rms_by_phase"].get(phase, math.nan) for phase in phases]
        places = [phase + (index - (len(rows) - 1) / 2) * width for phase in range(len(phases))]
        axes.bar(places, heights, width * 0.9, color=colours[row["series"]], label=row["series"])
    axes.set_xticks(range(len(phases)), [f"{phase}ed tokens" if phase != "decode" else "decoded tokens" for phase in phases])
    axes.set_ylabel("rms error against exact, nats")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    if logarithmic:
        axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)


def draw_parity(plt: Any, record: dict[str, Any]) -> Any:
    """Left: error by layer, stock against the variants. Right: each check as a share of its limit."""
    colours = _colours(record)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), constrained_layout=True)
    figure.suptitle(_title("Parity", record))
    rows = record["series"]
    layers = range(len(rows[0]["layer_rms"]))
    for index, row in enumerate(rows):
        # Side by side within a layer: series that agree would hide each other.
        places = [layer + (index - (len(rows) - 1) / 2) * 0.11 for layer in layers]
        style = {"color": colours[row["series"]], "markersize": 5, "linestyle": ""}
        left.plot(places, row["layer_rms"], "o", label=row["series"], **style)
        left.plot(places, row["layer_max"], "_", markeredgewidth=2, **style)
    left.plot([], [], "o", color="black", label="dot: rms of tokens")
    left.plot([], [], "_", color="black", markeredgewidth=2, label="bar: worst token")
    left.set_yscale("log")
    left.set_xticks(list(layers)[:: max(1, len(layers) // 16)])
    left.set_xlabel("layer")
    left.set_ylabel("relative error of hidden states against exact")
    left.grid(axis="y", which="both", color="#eeeeee")
    left.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    checks = [check for check in record["checks"] if check["limit"] > 0]
    shares = [(check["variant"], check["name"], check["value"] / check["limit"]) for check in checks]
    _strip(right, shares, colours)
    return figure


def draw_faults(plt: Any, record: dict[str, Any]) -> Any:
    """The check furthest beyond (or nearest to) its limit: of each fault, and of every run without one."""
    figure, axes = plt.subplots(figsize=(10, 4.2), constrained_layout=True)
    figure.suptitle("Largest statistic of a run over its limit, by planted fault")
    faults = list(dict.fromkeys(found["fault"] for found in record["rows"]))
    names = {fault: fault or "none" for fault in faults}
    for index, evaluation in enumerate(("perplexity", "parity")):
        places, shares = [], []
        for found in record["rows"]:
            if found["evaluation"] == evaluation:
                for entry in found["variants"]:
                    places.append(faults.index(found["fault"]) + (index - 0.5) * 0.25)
                    shares.append(max(min(entry["share"], 1e30), LEAST_SHARE))
        axes.plot(shares, places, MARKERS[index], color=OUR_COLOURS[index], alpha=0.6, label=evaluation)
    axes.axvline(1, color=ALARM_COLOUR, linewidth=1.2, label="alarm")
    axes.set_xscale("log")
    axes.set_yticks(range(len(faults)), [names[fault] for fault in faults])
    axes.invert_yaxis()
    axes.set_xlabel("statistic / limit")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _strip(axes: Any, shares: list[tuple[str, str, float]], colours: dict[str, str]) -> None:
    """`(variant, check, share of its limit)` as one line of marks a check."""
    names = list(dict.fromkeys(name for _, name, _ in shares))
    variants = list(dict.fromkeys(variant for variant, _, _ in shares))
    for index, variant in enumerate(variants):
        own = {name: share for v, name, share in shares if v == variant}
        places = [row + (index - (len(variants) - 1) / 2) * 0.18 for row in range(len(names))]
        values = [max(own[name], LEAST_SHARE) if own[name] == own[name] else math.nan for name in names]
        axes.plot(values, places, MARKERS[index % len(MARKERS)], color=colours[variant], label=variant, alpha=0.85)
    axes.axvline(1, color=ALARM_COLOUR, linewidth=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(left=LEAST_SHARE * 0.7)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_xlabel("share of the limit (right of the line alarms; at the left edge: 0.001 or less)")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)


def _colours(record: dict[str, Any]) -> dict[str, str]:
    """A colour for each series: greys for stock, red for what alarms."""
    alarmed = _alarmed(record)
    stock = [row["series"] for row in record["series"] if row["series"].startswith("stock")]
    ours = [row["series"] for row in record["series"] if row["series"] not in (*stock, "exact")]
    chosen = {name: STOCK_COLOURS[index % 2] for index, name in enumerate(stock)}
    for index, name in enumerate(ours):
        chosen[name] = ALARM_COLOUR if name in alarmed else OUR_COLOURS[index % len(OUR_COLOURS)]
    return chosen


def _alarmed(record: dict[str, Any]) -> set[str]:
    return {check["variant"] for check in record["checks"] if check["alarms"]}


def _wrapped(name: str) -> str:
    """A variant's name on two lines, so that it leaves room for the picture."""
    head, comma, tail = name.rpartition(",")
    return f"{head},\n{tail}" if comma and not name.startswith("stock") else name


def _title(name: str, record: dict[str, Any]) -> str:
    settings = record["settings"]
    fault = f", fault {settings['inject']}" if settings["inject"] else ""
    return f"{name}, {settings['model']}, {settings['dtype']}, {settings['data']}{fault}: {record['verdict']}"
