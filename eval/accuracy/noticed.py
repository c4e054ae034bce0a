"""Which evaluations noticed a fault, by the rows of a fault table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# How many of them have to notice a fault.
LEAST = 2


def caught(found: dict[str, Any]) -> bool:
    """Whether every variant alarmed, and not for having left the path that it was to take."""
    return all(entry["caught_by"] and not entry["off_path"] for entry in found["variants"])


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The faults that fewer than two evaluations noticed, each with those that did."""
    by_fault: dict[str, list[str]] = {found["fault"]: [] for found in rows if found["fault"]}
    for found in rows:
        if found["fault"] and caught(found):
            by_fault[found["fault"]].append(found["evaluation"])
    return [f"{fault} ({', '.join(names) or 'by none'})" for fault, names in by_fault.items() if len(names) < LEAST]
