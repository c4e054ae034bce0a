"""The report of `recall`: what stock and patched find by length and depth, the paired difference, and a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hf_fastattn.eval.accuracy.estimates import ALARM_LEVEL, ratio
from hf_fastattn.eval.accuracy.verdict import Check, path_check, table, verdict
from hf_fastattn.eval.reporting import report

WORDS = {"needle": "needle", "lookup": "look-up", "variable": "variables", "copy": "copy"}


def summarise(cells: Sequence[dict[str, Any]], exact: bool) -> dict[str, Any]:
    """Shares by task with paired differences, checks and verdict.

    Args:
        cells: as `recall.run` gives them.
        exact: the model computes in fp32, where whoever answers right has to go on doing so.
    """
    tasks, checks = [], []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        own = [cell for cell in cells if cell["task"] == task]
        stock, ours = (np.concatenate([cell[side] for cell in own]) for side in ("stock", "ours"))
        difference = ratio(ours - stock, np.ones(len(stock)))
        low, high = difference.interval()
        tasks.append(
            {
                "task": task,
                "prompts": len(stock),
                "stock": float(stock.mean()),
                "ours": float(ours.mean()),
                "difference": difference.value,
                "interval": [low, high],
                "differ": sum(cell["differ"] for cell in own),
            }
        )
        low, high = difference.interval(ALARM_LEVEL)
        checks.append(Check(task, "difference of what is found", abs(difference.value), max((high - low) / 2, 1e-9)))
        if exact:
            lost = int(((stock == 1) & (ours == 0)).sum())
            checks.append(Check(task, "right answers that are lost", lost, 0))
        checks.append(path_check(task, own))
    return {
        "cells": list(cells),
        "tasks": tasks,
        "checks": [asdict(check) | {"alarms": check.alarms} for check in checks],
        "verdict": verdict(checks),
    }


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    lines = [
        f"# Recall: {record['verdict']}",
        "",
        "Prompts whose whole answer is right. Contexts are computed first; question and answer go on from their pages.",
        "",
        "| task | prompts | stock | patched | difference (95%) | answers that differ |",
        "|---|---|---|---|---|---|",
    ]
    for one in record["tasks"]:
        low, high = (100 * end for end in one["interval"])
        lines.append(
            f"| {WORDS[one['task']]} | {one['prompts']} | {100 * one['stock']:.1f}% | {100 * one['ours']:.1f}% "
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
