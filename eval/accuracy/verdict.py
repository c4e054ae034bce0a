"""Checks with their limits, and the verdict over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Variances of independent errors add: twice stock's mean square error is as much error again as stock makes itself.
MEAN_SQUARE_FACTOR = 2.0
# FlashAttention's criterion (Dao, tests/test_flash_attn.py): our largest error at most twice PyTorch's.
MAXIMUM_FACTOR = 2.0
# Below a few roundings in fp32 of the value itself nothing is an error, whatever stock's own error is.
FLOOR_EPS = 4 * 2.0**-23


@dataclass(frozen=True)
class Check:
    """One statistic of one variant against its limit; it alarms above it, and if it is not a number."""

    variant: str
    name: str
    value: float
    limit: float
    note: str = ""

    @property
    def alarms(self) -> bool:
        """Whether the limit is passed."""
        return not self.value <= self.limit

    @property
    def share(self) -> float:
        """The statistic over its limit; above 1 it alarms."""
        if not math.isfinite(self.value):
            return math.inf
        return self.value / self.limit if self.limit > 0 else (math.inf if self.value > 0 else 0.0)


def verdict(checks: Sequence[Check]) -> str:
    """`green`, or `red` if a check alarms or there is none."""
    return "green" if checks and not any(check.alarms for check in checks) else "red"


def path_check(variant: str, counters: Sequence[dict[str, Any]]) -> Check:
    """The paged path did the work: batches in which it did not run, or something fell back. None may."""
    idle = sum(1 for call in counters if not call["forwards"] or call["fallbacks"])
    reasons = sorted({reason for call in counters for reason in call["fallbacks"]})
    return Check(variant, "batches off the paged path", idle, 0, "; ".join(reasons))


def loop_checks(
    variant: str, counters: Sequence[dict[str, Any]], share: bool, compacts: bool, alone: bool = False
) -> list[Check]:
    """The device's loop did what was asked of it: batches in which it did not run, nothing was replayed, prefixes were read
    row by row, pages of earlier prompts were not found (though they are looked for), or rows that were over stayed in the
    steps. None may.

    Args:
        share: rows share prefixes.
        compacts: rows are over at different steps.
        alone: each is in a call of its own.
    """
    idle = sum(1 for call in counters if not call["fast_loops"] or call["not_looped"])
    reasons = sorted({reason for call in counters for reason in call["not_looped"]})
    # Prompts of some models are never recorded, which is uncaptured too; a step whose capture failed is another matter.
    failed = [any(reason.startswith("capturing it failed") for reason in call["uncaptured"]) for call in counters]
    still = sum(1 for call, lost in zip(counters, failed, strict=True) if lost or not call["graphs_replayed"])
    layered = sorted({reason for call in counters for reason in call["uncaptured"]})
    found = [
        Check(variant, "batches off the device's loop", idle, 0, "; ".join(reasons)),
        Check(variant, "batches without replayed steps", still, 0, "; ".join(layered)),
    ]
    if alone:
        beside = sum(1 for call in counters if {rows for rows, _ in call["steps"]} != {1})
        found.append(Check(variant, "batches whose rows were not alone in their steps", beside, 0))
    if share:
        by_row = sum(1 for call in counters if call["shares"] and not any(sharers for _, sharers in call["steps"]))
        found.append(Check(variant, "batches whose prefixes were read row by row", by_row, 0))
    if any(call["keeps"] for call in counters):
        lost = sum(1 for call in counters if not call["tokens_reused"] and not call["prefix_unused"])
        why = sorted({reason for call in counters for reason in call["prefix_unused"]})
        found.append(Check(variant, "batches that found no pages of earlier prompts", lost, 0, "; ".join(why)))
    if compacts:
        stayed = sum(1 for call in counters if len({rows for rows, _ in call["steps"]}) < 2)
        found.append(Check(variant, "batches that kept rows that were over", stayed, 0))
    return found


def paths(names: Sequence[str], counters: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """Which path each variant ran on, as Markdown.

    Args:
        counters: of each batch, by variant.
    """
    lines = [
        "## What ran",
        "",
        "| variant | backend | the device's loop | recorded steps, rows (sharing) | replayed | not |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for name in names:
        own = [batch[name] for batch in counters]
        steps = sorted({(rows, sharers) for call in own for rows, sharers in call["steps"]})
        shown = ", ".join(f"{rows} ({sharers})" if sharers else str(rows) for rows, sharers in steps)
        loops, replayed = sum(call["fast_loops"] for call in own), sum(call["graphs_replayed"] for call in own)
        other = sorted({reason for call in own for key in ("not_looped", "uncaptured", "fallbacks") for reason in call[key]})
        looked = f"{loops} calls" if loops else "**not looked at**"
        lines.append(f"| {name} | {own[0]['backend']} | {looked} | {shown} | {replayed:,} | {'; '.join(other)} |")
    return lines


def table(checks: Sequence[Check]) -> str:
    """The checks as a Markdown table."""
    lines = ["| variant | check | value | limit | |", "|---|---|---|---|---|"]
    for check in checks:
        state = "**ALARM**" if check.alarms else "ok"
        note = f" ({check.note})" if check.note else ""
        lines.append(f"| {check.variant} | {check.name} | {check.value:.3g} | {check.limit:.3g} | {state}{note} |")
    return "\n".join(lines)
