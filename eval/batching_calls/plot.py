"""The picture of the batching benchmark: what is done a second, and the time between tokens against the load."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.batching_calls.table import NAMES
from hf_fastattn.eval.reporting.plot_words import logarithmic, measured

COLOURS = {
    "stock_batch": "#8d99a6",
    "stock_padded": "#4f5b66",
    "patched_padded": "#2ca02c",
    "rows_kept": "#9467bd",
    "ours": "#1f77b4",
}

# Panels that cases of a kind take.
KINDS = {"offline": 1, "load": 2, "arrival": 1}


def draw(pyplot: Any, record: dict[str, Any]) -> Any:
    """A panel for what there is: tokens a second of offline cases; these and gaps against the load; gaps beside a prompt."""
    by_kind = {kind: [row for row in record["cases"] if row["kind"] == kind and row["agrees"]] for kind in KINDS}
    count = max(sum(KINDS[kind] for kind, rows in by_kind.items() if rows), 1)
    figure, axes = pyplot.subplots(1, count, figsize=(8, 3.6), constrained_layout=True, squeeze=False)
    axes, left = axes[0], list(axes[0])
    figure.suptitle(f"Requests of different lengths, {record['dtype']}, on {record['environment']['device']}", fontsize=11)
    if by_kind["offline"]:
        _bars(left.pop(0), by_kind["offline"])
    for row in by_kind["load"]:
        done, gaps = left[:2]
        _lines(done, gaps, row["systems"])
        done.set(title="tokens/s against\nrequests/s offered", xlabel="requests/s")
        gaps.set(title="ms between tokens\n(solid: median, dashed: p99)", xlabel="requests/s")
    if by_kind["arrival"]:
        _gaps(left[-1], by_kind["arrival"][0])
    for panel in axes:
        panel.title.set_fontsize(9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="y", color="#eeeeee")
        panel.set_axisbelow(True)
    held: dict[str, Any] = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        held |= dict(zip(labels, handles, strict=True))
    figure.legend(held.values(), held.keys(), fontsize=8, frameon=False, ncols=3, loc="outside lower center")
    return figure


def _gaps(panel: Any, row: dict[str, Any]) -> None:
    panel.set_title(f"ms between tokens, a prompt of {row['long_prompt']:,} arriving")
    words = [
        ("alone_ms", "median", "before, median"),
        ("beside_ms", "median", "beside, median"),
        ("beside_ms", "p99", "beside, p99"),
    ]
    for index, (name, held) in enumerate(row["systems"].items()):
        values = [held[when][word] for when, word, _ in words]
        places = [place + index * 0.3 for place in range(len(words))]
        panel.bar(places, values, 0.28, color=COLOURS[name], label=NAMES[name].replace("`", ""))
        for place, value in zip(places, values, strict=True):
            panel.annotate(measured(value), (place, value), ha="center", va="bottom", fontsize=7)
    panel.set_xticks(range(len(words)), [label for *_, label in words])


def _bars(panel: Any, rows: list[dict[str, Any]]) -> None:
    panel.set_title("tokens/s, all requests at once")
    for index, name in enumerate(COLOURS):
        found = [(place, row["systems"][name]["tokens_s"]) for place, row in enumerate(rows) if name in row["systems"]]
        if not found:
            continue
        places, values = [place + (index - 2) * 0.16 for place, _ in found], [value for _, value in found]
        panel.bar(places, values, 0.15, color=COLOURS[name], label=NAMES[name].replace("`", ""))
        for place, value in zip(places, values, strict=True):
            panel.annotate(measured(value), (place, value), ha="center", va="bottom", fontsize=6, rotation=90)
    panel.set_xticks(range(len(rows)), [row["name"] for row in rows])
    if rows:
        logarithmic(panel.yaxis)
        panel.margins(y=0.2)


def _lines(done: Any, gaps: Any, systems: dict[str, Any]) -> None:
    for name, held in systems.items():
        points = [point for point in held["points"] if point["offered"] is not None]
        rates, label = [point["offered"] for point in points], NAMES[name].replace("`", "")
        done.plot(rates, [point["tokens_s"] for point in points], "o-", color=COLOURS[name], label=label)
        done.axhline(held["points"][0]["tokens_s"], color=COLOURS[name], linestyle=":", label=f"{label}, all at once")
        for word, style in (("median", "o-"), ("p99", "o--")):
            shown = [(rate, point["gap_ms"][word]) for rate, point in zip(rates, points, strict=True) if point["gap_ms"]]
            if shown:
                gaps.plot(*zip(*shown, strict=True), style, color=COLOURS[name])
    for panel in (done, gaps):
        logarithmic(panel.xaxis)
        logarithmic(panel.yaxis)
