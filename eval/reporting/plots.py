"""The pictures of the evaluations, as wide as a page. Each function takes `matplotlib.pyplot` and returns a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hf_fastattn.eval.reporting.plot_words import largest, logarithmic, series, unit

WIDTH = 8.0
STOCK_COLOURS = ("#8d99a6", "#4f5b66")
OUR_COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#17becf", "#bcbd22", "#8c564b")
BAND_COLOUR, ALARM_COLOUR, GRID_COLOUR = "#dde3e8", "#d62728", "#eeeeee"
MARKERS = "s^Dv<>PphX"
LEAST_SHARE = 1e-3
PHASES = {"prefill": ("prompt", "o"), "append": ("appended tokens", "s"), "decode": ("decoded tokens", "^")}
FAULT_NAMES = {
    "page": "two pages exchanged",
    "position": "key one position off",
    "mask": "newest key unseen",
    "scale": "scores times 1.03",
    "window": "window a page too short",
    "step-page": "pages of two rows exchanged",
    "step-slot": "keys a slot too far",
    "step-scale": "scores times 1.03, in graphs",
    "step-length": "rows a key too short",
    "step-rope": "stale angles of a row",
    "step-sampler": "too many tokens drawn from",
    "step-expert": "two experts exchanged",
    "step-prefix": "a row too many shares",
    "": "no fault",
}


def draw_perplexity(plt: Any, record: dict[str, Any]) -> Any:
    """A line a series. Left: the paired difference from stock, over stock's band. Right: rms error by phase."""
    rows = [row for row in record["series"] if row["series"] != "exact"][::-1]
    colours = _colours(record)
    size = (WIDTH, 1.9 + 0.36 * max(len(rows), 4))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, constrained_layout=True)
    figure.suptitle(_title("Perplexity", record), fontsize=11)
    compared = [(height, row) for height, row in enumerate(rows) if row["series"] != "stock"]
    size_of, words = unit([record["band"], *(abs(end) for _, row in compared for end in row["difference_interval"])])
    left.axvspan(
        -record["band"] / size_of, record["band"] / size_of, color=BAND_COLOUR, label="twice stock's own mean error"
    )
    left.axvline(0, color="black", linewidth=0.8)
    for height, row in compared:
        low, high = (end / size_of for end in row["difference_interval"])
        left.plot([low, high], [height, height], color=colours[row["series"]], linewidth=2.5, solid_capstyle="butt")
        left.plot(row["difference"] / size_of, height, "o", color=colours[row["series"]])
    left.set_yticks(range(len(rows)), [series(row["series"]) for row in rows])
    left.set_ylim(-0.6, len(rows) - 0.4)
    left.set_xlabel(f"difference from stock in pieces,\n{words}a nat a token, 95% interval", fontsize=9)
    left.tick_params(labelsize=8)
    _phases(right, rows, colours, bool(_alarmed(record)))
    handles, labels = (a + b for a, b in zip(*(axes.get_legend_handles_labels() for axes in (left, right)), strict=True))
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    return figure


def _phases(axes: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str], is_logarithmic: bool) -> None:
    """Rms errors of each row, a mark a phase."""
    errors = [error for row in rows for error in row["rms_by_phase"].values()]
    size, words = unit(errors)
    for index, (phase, (name, marker)) in enumerate(PHASES.items()):
        for height, row in enumerate(rows):
            if phase in row["rms_by_phase"]:
                place, value = height + 0.2 * (1 - index), row["rms_by_phase"][phase] / size
                axes.plot(value, place, marker, color=colours[row["series"]], markersize=5)
        axes.plot([], [], marker, color="black", markersize=5, label=name)
    if is_logarithmic:
        logarithmic(axes.xaxis, subs=(1,))
    else:
        axes.set_xlim(0, 1.15 * largest(errors) / size)
    axes.set_xlabel(f"rms error against exact,\n{words}a nat", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color=GRID_COLOUR)


def draw_parity(plt: Any, record: dict[str, Any]) -> Any:
    """Above: error by layer, stock against the variants. Below: each check as a share of its limit."""
    colours = _colours(record)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 7.6), constrained_layout=True)
    figure.suptitle(_title("Parity", record), fontsize=11)
    _layers(upper, record["series"], colours)
    checks = [check for check in record["checks"] if check["limit"] > 0]
    shares = [(check["variant"], check["name"], check["value"] / check["limit"]) for check in checks]
    _strip(lower, shares, colours)
    figure.legend(*upper.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def _layers(axes: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    """Errors by layer, the mean a filled mark and the worst token a hollow one."""
    layers = range(len(rows[0]["layer_rms"]))
    size, words = unit(error for row in rows for error in row["layer_max"])
    for index, row in enumerate(rows):
        # Side by side within a layer: series that agree would hide each other.
        places = [layer + (index - (len(rows) - 1) / 2) * 0.11 for layer in layers]
        style = {"color": colours[row["series"]], "markersize": 5, "linestyle": "", "marker": _marker(rows, index)}
        axes.plot(places, [error / size for error in row["layer_rms"]], label=series(row["series"]), **style)
        axes.plot(places, [error / size for error in row["layer_max"]], markerfacecolor="none", **style)
    axes.plot([], [], "o", color="black", markersize=5, label="filled: rms of all tokens")
    axes.plot([], [], "o", color="black", markersize=5, markerfacecolor="none", label="hollow: worst token")
    logarithmic(axes.yaxis)
    axes.set_xticks(list(layers)[:: max(1, len(layers) // 16)])
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel(f"error of hidden states against exact,\n{words}their size", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color=GRID_COLOUR)


def _marker(rows: Sequence[dict[str, Any]], index: int) -> str:
    stock = sum(row["series"].startswith("stock") for row in rows)
    return "o" if index < stock else MARKERS[(index - stock) % len(MARKERS)]


def draw_logprobs(plt: Any, record: dict[str, Any]) -> Any:
    """Left: quantiles of the differences, a line a series. Right: each check as a share of its limit."""
    colours = _colours(record)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 6.4), constrained_layout=True)
    figure.suptitle(_title("Log-probabilities", record), fontsize=11)
    size, words = unit(value for row in record["series"] for value in row["quantiles"])
    for index, row in enumerate(record["series"]):
        marker, name = _marker(record["series"], index), row["series"] if row["series"] == "stock" else series(row["series"])
        style = {"color": colours[row["series"]], "marker": marker, "markersize": 5, "linewidth": 1}
        upper.plot(range(4), [value / size for value in row["quantiles"]], label=name, **style)
    upper.set_xticks(range(4), ["half of all tokens", "90%", "99%", "all"])
    upper.set_xlabel("share of tokens", fontsize=9)
    upper.set_ylabel(f"generate() and a later forward differ\nby at most so many {words}a nat", fontsize=9)
    upper.tick_params(labelsize=8)
    upper.grid(axis="y", color=GRID_COLOUR)
    checks = [check for check in record["checks"] if check["limit"] > 0]
    _strip(lower, [(check["variant"], check["name"], check["value"] / check["limit"]) for check in checks], colours)
    figure.legend(*upper.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def draw_faults(plt: Any, record: dict[str, Any]) -> Any:
    """The check furthest beyond (or nearest to) its limit: of each fault, and of every run without one."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), constrained_layout=True)
    figure.suptitle("The check that is furthest beyond its limit, by planted fault", fontsize=11)
    faults = list(dict.fromkeys(found["fault"] for found in record["rows"]))
    known = dict.fromkeys(found["evaluation"] for found in record["rows"])
    for index, evaluation in enumerate(known):
        places, shares = [], []
        for found in record["rows"]:
            if found["evaluation"] == evaluation:
                for entry in found["variants"]:
                    places.append(faults.index(found["fault"]) + (index - (len(known) - 1) / 2) * 0.25)
                    shares.append(max(min(entry["share"], 1e30), LEAST_SHARE))
        axes.plot(
            shares, places, MARKERS[index], color=OUR_COLOURS[index], alpha=0.6, label=f"hf-fastattn eval {evaluation}"
        )
    axes.axvline(1, color=ALARM_COLOUR, linewidth=1.2, label="limit: beyond it the check alarms")
    logarithmic(axes.xaxis, subs=(1,))
    # Each power of ten would be too many words.
    axes.set_xticks([value for value in (1e-3, 1, 1e3, 1e6, 1e9, 1e12) if value <= axes.get_xlim()[1]])
    axes.set_yticks(range(len(faults)), [FAULT_NAMES.get(fault, fault) for fault in faults])
    axes.invert_yaxis()
    axes.set_xlabel("value of the check / its limit", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", color=GRID_COLOUR)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return figure


def _strip(axes: Any, shares: list[tuple[str, str, float]], colours: dict[str, str]) -> None:
    """`(variant, check, share of its limit)` as one line of marks a check."""
    names = list(dict.fromkeys(name for _, name, _ in shares))
    variants = list(dict.fromkeys(variant for variant, _, _ in shares))
    for index, variant in enumerate(variants):
        own = {name: share for v, name, share in shares if v == variant}
        # Not every variant has every check.
        known = [name for name in names if name in own]
        places = [names.index(name) + (index - (len(variants) - 1) / 2) * 0.15 for name in known]
        values = [max(own[name], LEAST_SHARE) if own[name] == own[name] else math.nan for name in known]
        axes.plot(values, places, MARKERS[index % len(MARKERS)], color=colours[variant], markersize=5, alpha=0.85)
    axes.axvline(1, color=ALARM_COLOUR, linewidth=1.2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    logarithmic(axes.xaxis, subs=(1,))
    axes.set_xlim(left=LEAST_SHARE * 0.7)
    axes.grid(axis="x", color=GRID_COLOUR)
    axes.set_xlabel("value of the check / its limit; alarms right of the red line, 0.001 or less at the edge", fontsize=9)
    axes.tick_params(labelsize=8)


def _colours(record: dict[str, Any]) -> dict[str, str]:
    """A colour for each series: greys for stock, red for what alarms."""
    alarmed = _alarmed(record)
    stock = [row["series"] for row in record["series"] if row["series"].startswith("stock")]
    # Some variants have no series of their own, and records may name none.
    ours = [row["series"] for row in record["series"] if row["series"] not in (*stock, "exact")]
    ours += [name for name in record.get("variants", ()) if name not in ours]
    chosen = {name: STOCK_COLOURS[index % 2] for index, name in enumerate(stock)}
    for index, name in enumerate(ours):
        chosen[name] = ALARM_COLOUR if name in alarmed else OUR_COLOURS[index % len(OUR_COLOURS)]
    return chosen


def _alarmed(record: dict[str, Any]) -> set[str]:
    return {check["variant"] for check in record["checks"] if check["alarms"]}


def _title(name: str, record: dict[str, Any]) -> str:
    settings = record["settings"]
    data = "held-out text" if settings["data"] == "heldout" else settings["data"]
    fault = f", fault {settings['inject']} planted" if settings["inject"] else ""
    verdict = "no alarm" if record["verdict"] == "green" else "alarms"
    return f"{name}: {settings['model']}, {settings['dtype']}, {data}{fault}: {verdict}"
