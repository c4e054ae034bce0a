"""Run a program on both sides, and say what differs and which paths ran."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.fuzz.compare import books_differ, difference
from tests.fuzz.reasons import unknown_reasons
from tests.fuzz.side import Outcome, Side


@dataclass
class Result:
    """Of one program.

    Attributes:
        problem: what differs, or None.
        step: at which step.
        paths: per step, what the counters of the patched side say.
        errors: steps at which stock raised.
    """

    problem: str | None = None
    step: int = -1
    paths: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def run_program(program: dict[str, Any], check_reasons: bool = True) -> Result:
    """Both sides step by step, up to the first difference."""
    transformers.logging.set_verbosity_error()
    result = Result()
    with warnings.catch_warnings(), _graphs(program), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            stock, ours = Side(program, False), Side(program, True)
        except Exception:
            result.problem = f"cannot be set up: {traceback.format_exc(limit=-3)}"
            return result
        for result.step, step in enumerate(program["steps"]):
            step = {**step, "do": step["do"]}
            theirs, mine = stock.do(step), ours.do(step)
            result.paths.append(path_of(mine))
            if theirs.error is not None:
                result.errors.append(": ".join(theirs.error)[:160])
            # After a call that only one side could do the chat goes on there alone.
            apart = (mine.error is None) != (theirs.error is None)
            result.problem = difference(theirs, mine, is_limited(program)) or books_differ(ours, mine)
            if result.problem is None and check_reasons:
                result.problem = unknown_reasons(program, result.step, result.paths[-1]["fallbacks"])
            if result.problem is not None or apart or (mine.error or "")[:1] == ("CacheFullError",):
                return result
    return result


def is_limited(program: dict[str, Any]) -> bool:
    """Whether the pages of a program may need more than its limit."""
    return bool(program["patch"].get("memory_limit", 1 << 40) < 4 << 20)


def path_of(outcome: Outcome) -> dict[str, Any]:
    """What ran, as plain data."""
    call = outcome.counters
    if call is None:
        return {"forwards": 0, "loops": 0, "shared": False, "fallbacks": {}}
    return {
        "forwards": call.forwards,
        "loops": call.fast_loops,
        "shared": call.pages_shared > 0,
        "tokens": call.prompt_tokens,
        "fallbacks": dict(call.fallbacks),
    }


@contextlib.contextmanager
def _graphs(program: dict[str, Any]) -> Any:
    """Captured steps and the device's own loop, run again on the CPU."""
    if not program.get("graphs"):
        yield
        return
    from tests.tools.reexecuted import reexecuted_loop

    with reexecuted_loop():
        yield


def is_excused(program: dict[str, Any]) -> bool:
    """Whether a program that differs shows no fault of ours: stock's own NaN, or two tokens that were nearly tied."""
    edits = {step.get("kind") for step in program["steps"] if step["do"] == "edit"}
    eager = program["over"].get("attn_implementation") == "eager" or "eager" in edits
    padded = any(step.get("prompt", {}).get("pad", "none") != "none" for step in program["steps"])
    if eager and padded and (program["dtype"] == "float64" or "float64" in edits):
        # The softmax of a fully masked row is taken in fp32, where the least fp64 number is -inf.
        return True
    # Nearly tied tokens are not tied in fp64.
    return program["dtype"] == "float32" and run_program({**program, "dtype": "float64"}).problem is None
