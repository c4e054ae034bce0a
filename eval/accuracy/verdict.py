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


def table(checks: Sequence[Check]) -> str:
    """The checks as a Markdown table."""
    lines = ["| variant | check | value | limit | |", "|---|---|---|---|---|"]
    for check in checks:
        state = "**ALARM**" if check.alarms else "ok"
        note = f" ({check.note})" if check.note else ""
        lines.append(f"| {check.variant} | {check.name} | {check.value:.3g} | {check.limit:.3g} | {state}{note} |")
    return "\n".join(lines)
