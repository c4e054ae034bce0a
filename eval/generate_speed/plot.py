"""The picture of the `generate()` benchmark: time per token and first token, with limits and targets."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.generate_speed.table import is_green
from hf_fastattn.eval.generate_speed.targets import TARGETS, targets
from hf_fastattn.eval.reporting.plot_words import logarithmic, measured

COLOURS = {"stock": "#8d99a6", "grouped_mm": "#8c564b", "compiled": "#4f5b66", "stays": "#9467bd", "patched": "#1f77b4"}
NAMES = {
    "stock": "stock Transformers",
    "grouped_mm": "stock, experts by grouped_mm in steps",
    "compiled": "stock, static cache and torch.compile",
    "stays": "patched, ended rows kept",
    "patched": "patched",
}
BAR_COLOUR, AIM_COLOUR = "#d62728", "#2ca02c"
REACH = 0.45


def draw_speed(plt: Any, record: dict[str, Any]) -> Any:
    """Two panels, one group of marks a case; a red case shows nothing of ours."""
    rows = record["cases"]
    size = (max(8, 1 + 0.9 * len(rows)), 7)
    figure, panels = plt.subplots(2, 1, figsize=size, sharex=True, constrained_layout=True)
    settings, device = record["settings"], record["environment"]["device"]
    figure.suptitle(f"generate() of {settings['model']}, {settings['dtype']}, on {device}", fontsize=11)
    titles = ("time of a token after the first, ms", "time to the first token, ms")
    for panel, name, title in zip(panels, ("token_ms", "first_ms"), titles, strict=True):
        for system, (places, values) in _series(rows, name).items():
            panel.plot(places, values, "o", color=COLOURS[system], markersize=5, label=NAMES[system])
            for place, value in zip(places, values, strict=True):
                _annotate(panel, place, value)
        if settings["shape"] in TARGETS:
            _targets(panel, rows, name, settings["shape"])
        logarithmic(panel.yaxis)
        panel.set_ylabel(title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="y", color="#eeeeee")
        panel.set_axisbelow(True)
        panel.margins(y=0.14)
    limits = [(place, row["systems"]["patched"]["limit_ms"]) for place, row in enumerate(rows)]
    limits = [found for found in limits if found[1] is not None]
    _lines(panels[0], limits, "black", "solid", "limit: weights, keys and values read once")
    panels[1].set_xticks(range(len(rows)), [f"{row['kind']}\n{row['name']}" for row in rows], fontsize=8)
    panels[1].set_xlabel("kind of call; rows x tokens of a prompt, or samples of a prompt", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    return figure


def _annotate(panel: Any, place: float, value: float) -> None:
    """The value over its mark, on white so that no line runs through it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 7.5, "bbox": box}
    panel.annotate(measured(value), (place, value), (0, 6), **style)


def _series(rows: list[dict[str, Any]], name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Places and values of each system."""
    found, systems = {}, [system for system in COLOURS if any(system in row["systems"] for row in rows)]
    for index, system in enumerate(systems):
        shown = [(place, row) for place, row in enumerate(rows) if system in row["systems"]]
        shown = [(place, row) for place, row in shown if system != "patched" or is_green(row)]
        shift = (index - (len(systems) - 1) / 2) * 0.8 / len(systems)
        found[system] = [place + shift for place, _ in shown], [row["systems"][system][name] for _, row in shown]
    return found


def _targets(panel: Any, rows: list[dict[str, Any]], name: str, shape: str) -> None:
    found = [(place, target) for place, row in enumerate(rows) for target in targets(row, shape) if target.figure == name]
    _lines(panel, [(place, target.bar) for place, target in found], BAR_COLOUR, "dashed", "target, at most")
    _lines(panel, [(place, target.aim) for place, target in found], AIM_COLOUR, "dashed", "target, at best")


def _lines(panel: Any, found: list[tuple[int, float]], colour: str, style: str, label: str) -> None:
    if found:
        ends = [place - REACH for place, _ in found], [place + REACH for place, _ in found]
        panel.hlines([value for _, value in found], *ends, colors=colour, linestyles=style, linewidth=1.2, label=label)
