"""What `generate()` is to reach on an H200 with the Llama-3-8B shape: a bar, and the aim beyond it.

The bars lie between what the products of a step take (3.45 ms for one row) and what Transformers' static cache with
`torch.compile` reaches (6.5 ms a token for one row of 512 tokens, after 21 s of compiling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHAPE = "llama-3-8b"
# kind, rows, tokens of the prompt: figure of the case -> (bar, aim).
TARGETS: dict[tuple[str, int, int], dict[str, tuple[float, float]]] = {
    ("greedy", 1, 512): {"token_ms": (4.6, 3.9)},
    ("greedy", 1, 8192): {"token_ms": (4.9, 4.2), "first_ms": (230, 205)},
    ("greedy", 16, 2048): {"token_ms": (6.0, 5.1), "call_65_s": (2.0, 1.4)},
    ("greedy", 64, 1024): {"token_ms": (7.8, 6.6), "call_65_s": (3.5, 2.6)},
    ("sampling", 16, 2048): {"token_ms": (6.4, 5.4)},
    ("callbacks", 1, 512): {"token_ms": (7.5, 6.0)},
    ("samples", 16, 8192): {"first_ms": (260, 215), "token_ms": (6.0, 4.9), "peak_gb": (20, 18)},
    ("samples", 64, 2048): {"first_ms": (90, 65), "token_ms": (6.5, 5.3)},
}
# Seconds of the first call of a process in which nothing was compiled before.
FIRST_CALL = (15.0, 5.0)
NAMES = {
    "token_ms": "a token, ms",
    "first_ms": "first token, ms",
    "call_65_s": "whole call of 65 tokens, s",
    "peak_gb": "peak memory, GB",
    "first_call_s": "first call of the process, s",
}


@dataclass(frozen=True)
class Target:
    """One figure of ours beside its bar and its aim."""

    figure: str
    value: float
    bar: float
    aim: float

    @property
    def state(self) -> str:
        """Which of the two is reached, or by how much the bar is missed."""
        if self.value <= self.aim:
            return "aim reached"
        return "bar reached" if self.value <= self.bar else f"{self.value / self.bar:.2f} x the bar"


def targets(row: dict[str, Any]) -> list[Target]:
    """What is asked of one case's record, and what it reached.

    Args:
        row: as `Bench.measure` returns it.
    """
    ours = row["systems"]["patched"]
    values = {**ours, "call_65_s": (ours["first_ms"] + 64 * ours["token_ms"]) / 1e3}
    wanted = dict(TARGETS.get((row["kind"], row["rows"], row["prompt"]), {}))
    if row["process_first_call_s"] is not None:
        values["first_call_s"] = row["process_first_call_s"]
        wanted["first_call_s"] = FIRST_CALL
    return [Target(name, values[name], *ends) for name, ends in wanted.items() if values[name] is not None]
