"""The report of `recall`: what stock and patched find by length and depth, the paired difference, and a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_fastattn.eval.accuracy.estimates import ALARM_LEVEL, paired_shares, ratio
from hf_fastattn.eval.accuracy.verdict import Check, path_check, table, verdict
from hf_fastattn.eval.reporting import report

WORDS = {"needle": "needle", "lookup": "look-up", "variable": "variables", "copy": "copy"}
SIDES = {"stock": "stock", "rounded": "stock, rounded", "ours": "patched"}


# Points that keys and values in 8 bits may lose, over all tasks.
MOST_POINTS = 1.0


def summarise(cells: Sequence[dict[str, Any]], exact: bool) -> dict[str, Any]:
    """Shares by task with paired differences, checks and verdict.

    Args:
        cells: as `recall.run` gives them; with `rounded`, what stock answers over a cache that rounds, that is what ours
            is held against, and what rounding costs is checked for itself.
        exact: the model computes in fp32, where whoever answers right has to go on doing so. (Not where keys are rounded:
            which way may hang on the last bit.)
    """
    base = "rounded" if "rounded" in cells[0] else "stock"
    tasks, checks = [], []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own = [cell for cell in cells if cell["task"] == task]
        theirs, ours = _sides(own, base, "ours")
        tasks.append({"task": task, **_compared(own), "differ": sum(cell["differ"] for cell in own)})
        difference = ratio(ours - theirs, np.ones(len(theirs)))
        low, high = difference.interval(ALARM_LEVEL)
        checks.append(Check(task, "difference of what is found", abs(difference.value), max((high - low) / 2, 1e-9)))
        if exact and base == "stock":
            lost = int(((theirs == 1) & (ours == 0)).sum())
            checks.append(Check(task, "right answers that are lost", lost, 0))
        checks.append(path_check(task, own))
    if base == "rounded":
        found = _compared(cells)
        low, high = (-100 * end for end in reversed(found["interval"]))
        note = f"95%: {low:+.2f} to {high:+.2f}"
        checks.append(Check("all", "points that 8 bits lose", 0.0 - 100 * found["difference"], MOST_POINTS, note))
    return {
        "cells": list(cells),
        "tasks": tasks,
        "all": _compared(cells),
        "planted": sum(cell.get("planted", 0) for cell in cells),
        "checks": [asdict(check) | {"alarms": check.alarms} for check in checks],
        "verdict": verdict(checks),
    }


def _sides(cells: Sequence[dict[str, Any]], *sides: str) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate([cell[side] for cell in cells]) for side in sides)


def _compared(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The share that each side finds, and the paired difference of ours and stock as it is."""
    stock, ours = _sides(cells, "stock", "ours")
    won, lost = int(((stock == 0) & (ours == 1)).sum()), int(((stock == 1) & (ours == 0)).sum())
    found: dict[str, Any] = {"prompts": len(stock)}
    found |= {side: float(np.mean(_sides(cells, side)[0])) for side in SIDES if side in cells[0]}
    found |= {"difference": (won - lost) / len(stock), "interval": list(paired_shares(won, lost, len(stock)))}
    return found


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    lines = [
        f"# Recall: {record['verdict']}{_fault(record)}",
        "",
        "Prompts whose whole answer is right. Contexts are computed first; question and answer go on from their pages.",
        *_format_lines(record),
        "",
    ]
    sides = [side for side in SIDES if side in record["all"]]
    columns = ["task", "prompts", *(SIDES[side] for side in sides), "patched less stock (95%)", "answers that differ"]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    differ = sum(one["differ"] for one in record["tasks"])
    for one in (*record["tasks"], {"task": "all", **record["all"], "differ": differ}):
        low, high = (100 * end for end in one["interval"])
        found = " | ".join(f"{100 * one[side]:.1f}%" for side in sides)
        lines.append(
            f"| {WORDS.get(one['task'], one['task'])} | {one['prompts']:,} | {found} "
            f"| {100 * one['difference']:+.2f} ({low:+.2f} to {high:+.2f}) points | {one['differ']} |"
        )
    depths = sorted({cell["depth"] for cell in record["cells"]})
    lines += ["", "By length and depth (0 is the start of the context), stock / patched, %:", ""]
    lines += [f"| task | tokens | {' | '.join(f'{depth:g}' for depth in depths)} |", f"|---|---|{'---|' * len(depths)}"]
    for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in record["cells"]):
        row = {cell["depth"]: cell for cell in record["cells"] if (cell["task"], cell["length"]) == (task, length)}
        shares = [f"{_share(row[depth], 'stock'):.0f} / {_share(row[depth], 'ours'):.0f}" for depth in depths]
        lines.append(f"| {WORDS[task]} | {length:,} | {' | '.join(shares)} |")
    checks = [Check(*(check[name] for name in ("variant", "name", "value", "limit", "note"))) for check in record["checks"]]
    return "\n".join([*lines, "", table(checks), "", report.environment_lines(record)])


def _fault(record: dict[str, Any]) -> str:
    fault = record["settings"]["inject"]
    return "" if fault == "None" else f", fault **{fault}** planted ({record['planted']:,} times in force)"


def _format_lines(record: dict[str, Any]) -> list[str]:
    if "rounded" not in record["all"]:
        return []
    return [
        f"Keys and values are kept in {record['settings']['kv_dtype']}: what the patched model finds is held against stock "
        "over caches that round them alike, and what rounding costs is its difference from stock as it is."
    ]


def _share(cell: dict[str, Any], side: str) -> float:
    return 100 * float(np.mean(cell[side]))


def draw(plt: Any, record: dict[str, Any]) -> Any:
    """A heat map a task, above what stock finds, below what the patched model does."""
    tasks = list(dict.fromkeys(cell["task"] for cell in record["cells"]))
    figure, axes = plt.subplots(2, len(tasks), figsize=(8.0, 4.6), squeeze=False, constrained_layout=True)
    figure.suptitle("What is found again, by length of the context and depth in it", fontsize=11)
    image = None
    for column, task in enumerate(tasks):
        own = [cell for cell in record["cells"] if cell["task"] == task]
        lengths, depths = (sorted({cell[name] for cell in own}) for name in ("length", "depth"))
        for row, (side, word) in enumerate((("stock", "stock"), ("ours", "patched"))):
            shares = np.full((len(depths), len(lengths)), np.nan)
            for cell in own:
                shares[depths.index(cell["depth"]), lengths.index(cell["length"])] = _share(cell, side)
            one = axes[row][column]
            image = one.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            for y, x in np.ndindex(*shares.shape):
                colour = "black" if 20 < shares[y, x] < 80 else "white"
                one.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", fontsize=7, color=colour)
            one.set_title(f"{WORDS[task]}, {word}", fontsize=9)
            one.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            one.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            one.set_xlabel("tokens of the context", fontsize=8)
            one.set_ylabel("depth" if column == 0 else "", fontsize=8)
            one.tick_params(labelsize=7)
    figure.colorbar(image, ax=axes, shrink=0.8).ax.set_title("right, %", fontsize=8)
    return figure
