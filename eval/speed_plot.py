"""The picture of the `generate()` benchmark: time per token and first token, with the limits, bars and aims."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.speed_table import is_green
from hf_fastattn.eval.speed_targets import SHAPE, targets

COLOURS = {"stock": "#8d99a6", "compiled": "#4f5b66", "stays": "#9467bd", "patched": "#1f77b4"}
BAR_COLOUR, AIM_COLOUR = "#d62728", "#2ca02c"
REACH = 0.45


def draw_speed(plt: Any, record: dict[str, Any]) -> Any:
    """Two panels, one group of marks a case; a red case shows nothing of ours."""
    rows = record["cases"]
    figure, panels = plt.subplots(2, 1, figsize=(3 + 1.3 * max(len(rows), 3), 8.5), sharex=True, constrained_layout=True)
    figure.suptitle(f"generate() of {record['settings']['model']} on {record['environment']['device']}")
    for panel, name, title in zip(panels, ("token_ms", "first_ms"), ("a token, ms", "first token, ms"), strict=True):
        for system, (places, values) in _series(rows, name).items():
            panel.plot(places, values, "o", color=COLOURS[system], label=system)
            for place, value in zip(places, values, strict=True):
                panel.annotate(f"{value:.4g}", (place, value), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        if record["settings"]["shape"] == SHAPE:
            _targets(panel, rows, name)
        panel.set_ylabel(title)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(axis="y", which="both", color="#eeeeee")
        panel.set_axisbelow(True)
        panel.margins(y=0.12)
    limits = [(place, row["systems"]["patched"]["limit_ms"]) for place, row in enumerate(rows)]
    _lines(panels[0], [found for found in limits if found[1] is not None], "black", "solid", "read limit")
    panels[1].set_xticks(range(len(rows)), [f"{row['kind']}\n{row['name']}" for row in rows], fontsize=8)
    panels[0].legend(frameon=False, fontsize=8, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _series(rows: list[dict[str, Any]], name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Places and values of each system."""
    found, systems = {}, [system for system in COLOURS if any(system in row["systems"] for row in rows)]
    for index, system in enumerate(systems):
        shown = [(place, row) for place, row in enumerate(rows) if system in row["systems"]]
        shown = [(place, row) for place, row in shown if system != "patched" or is_green(row)]
        shift = (index - (len(systems) - 1) / 2) * 0.8 / len(systems)
        found[system] = [place + shift for place, _ in shown], [row["systems"][system][name] for _, row in shown]
    return found


def _targets(panel: Any, rows: list[dict[str, Any]], name: str) -> None:
    found = [(place, target) for place, row in enumerate(rows) for target in targets(row) if target.figure == name]
    _lines(panel, [(place, target.bar) for place, target in found], BAR_COLOUR, "dashed", "bar")
    _lines(panel, [(place, target.aim) for place, target in found], AIM_COLOUR, "dashed", "aim")


def _lines(panel: Any, found: list[tuple[int, float]], colour: str, style: str, label: str) -> None:
    if found:
        ends = [place - REACH for place, _ in found], [place + REACH for place, _ in found]
        panel.hlines([value for _, value in found], *ends, colors=colour, linestyles=style, linewidth=1.2, label=label)
