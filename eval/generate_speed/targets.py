"""What `generate()` is to reach on an H200 with the Llama-3-8B and the Qwen3-30B-A3B shape: a bar, and the aim beyond it.

Llama's bars lie between what the products of a step take (3.45 ms for one row) and what Transformers' static cache with
`torch.compile` reaches (6.5 ms a token for one row of 512 tokens, after 21 s of compiling). Of Qwen3-30B-A3B the weights
that 1, 8 and 64 rows read, with those of the experts that they are expected to choose, take 1.38, 5.9 and 13.5 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

SHAPE = "llama-3-8b"
Figures: TypeAlias = dict[tuple[str, int, int], dict[str, tuple[float, float]]]
# kind, rows, tokens of the prompt: figure of the case -> (bar, aim).
LLAMA: Figures = {
    ("greedy", 1, 512): {"token_ms": (4.6, 3.9)},
    ("greedy", 1, 8192): {"token_ms": (4.9, 4.2), "first_ms": (230, 205)},
    ("greedy", 16, 2048): {"token_ms": (6.0, 5.1), "call_65_s": (2.0, 1.4)},
    ("greedy", 64, 1024): {"token_ms": (7.8, 6.6), "call_65_s": (3.5, 2.6)},
    ("sampling", 16, 2048): {"token_ms": (6.4, 5.4)},
    ("callbacks", 1, 512): {"token_ms": (7.5, 6.0)},
    ("samples", 16, 8192): {"first_ms": (260, 215), "token_ms": (6.0, 4.9), "peak_gb": (20, 18)},
    ("samples", 64, 2048): {"first_ms": (90, 65), "token_ms": (6.5, 5.3)},
}
TARGETS: dict[str, Figures] = {
    SHAPE: LLAMA,
    "qwen3-30b-a3b": {
        ("greedy", 1, 512): {"token_ms": (3.0, 2.0)},
        ("greedy", 8, 512): {"token_ms": (8.5, 7.0)},
        ("greedy", 64, 512): {"token_ms": (18.0, 15.5)},
    },
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


def targets(row: dict[str, Any], shape: str | None) -> list[Target]:
    """What is asked of one case's record, and what it reached.

    Args:
        row: as `Bench.measure` returns it.
        shape: of the model.
    """
    ours = row["systems"]["patched"]
    values = {**ours, "call_65_s": (ours["first_ms"] + 64 * ours["token_ms"]) / 1e3}
    if shape not in TARGETS:
        return []
    wanted = dict(TARGETS[shape].get((row["kind"], row["rows"], row["prompt"]), {}))
    if row["process_first_call_s"] is not None and shape == SHAPE:
        values["first_call_s"] = row["process_first_call_s"]
        wanted["first_call_s"] = FIRST_CALL
    return [Target(name, values[name], *ends) for name, ends in wanted.items() if values[name] is not None]
