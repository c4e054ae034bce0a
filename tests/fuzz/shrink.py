"""Greedy delta debugging: drop steps and options from a failing program while it fails in the same way."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Iterator
from typing import Any

from tests.fuzz.run import run_program

Program = dict[str, Any]
# Without which a step means nothing.
NEEDED = (
    "do", "prompt", "with", "kind", "at", "layer", "edit", "amount", "columns", "on", "unpatched", "scale", "after", "new",
)  # fmt: skip
SIMPLER: dict[str, list[Any]] = {
    "rows": [1, 2],
    "length": [1, 5, 9, 17],
    "max_new_tokens": [1, 2, 5],
    "num_beams": [2],
    "num_return_sequences": [2],
    "pad": ["none", "left"],
    "family": ["llama", "mistral_window"],
    "page_size": [4, 16],
    "seed": [0],
    "columns": [1],
    "new": [1],
    "mask": ["ones"],
}


def shrink(program: Program, seconds: float = 60.0) -> Program:
    """The smallest program found that fails as `program` does."""
    end = time.monotonic() + seconds
    problem = kind_of(run_program(program).problem)
    progress = problem is not None
    while progress:
        progress = False
        for smaller in candidates(program):
            if time.monotonic() > end:
                return program
            if kind_of(run_program(smaller).problem) == problem:
                program, progress = smaller, True
                break
    return program


def kind_of(problem: str | None) -> str | None:
    """A problem without its figures."""
    return None if problem is None else re.sub(r"[\d.,\[\]()e+-]+", "#", problem)[:70]


def candidates(program: Program) -> Iterator[Program]:
    """Programs with one thing less, big things first."""
    steps = program["steps"]
    for place in range(len(steps)):
        if len(steps) > 1:
            yield {**program, "steps": steps[:place] + steps[place + 1 :]}
    for entry in ("graphs",):
        if entry in program:
            yield {name: value for name, value in program.items() if name != entry}
    for path in _paths(program, ()):
        name = path[-1]
        if name not in NEEDED and not isinstance(_at(program, path), list) and len(path) > 1:
            yield _without(program, path)
        for simpler in _simpler(str(name), _at(program, path)):
            yield _with(program, path, simpler)


def _simpler(name: str, now: Any) -> list[Any]:
    """Values that are simpler than `now`, the simplest first."""
    values = SIMPLER.get(name, [])
    if isinstance(now, int):
        return [value for value in values if value < now]
    return values[: values.index(now)] if now in values else values


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if path[-1:] == ("steps",) else ()
    for name, inner in items:
        if isinstance(name, str):
            yield (*path, name)
        yield from _paths(inner, (*path, name))


def _at(program: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        program = program[name]
    return program


def _without(program: Program, path: tuple[Any, ...]) -> Program:
    copied = copy.deepcopy(program)
    del _at(copied, path[:-1])[path[-1]]
    return copied


def _with(program: Program, path: tuple[Any, ...], value: Any) -> Program:
    copied = copy.deepcopy(program)
    _at(copied, path[:-1])[path[-1]] = value
    return copied


def as_line(program: Program) -> str:
    """How to run a program again."""
    return f"python -m tests.fuzz --program '{json.dumps(program)}'"
