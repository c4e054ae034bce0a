"""Calls in which one rank fails; in each of the processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.generation.shared_prompt import SharedPrompt
from hf_fastattn.loop.decode_loop import DecodeLoop
from hf_fastattn.parallel import watch
from hf_fastattn.patches.fused import halves
from tests.parallel.ranks import WatchedSums, load, one, rank
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.reexecuted import reexecuted_loop

PROMPT = torch.arange(1, 97)[None]
CALLS: dict[str, dict[str, Any]] = {
    "step": {"input_ids": torch.ones(1, 8, dtype=torch.long), "max_new_tokens": 400},
    "halves": {"input_ids": PROMPT, "max_new_tokens": 4},
    # Rows that begin alike are computed in two turns.
    "prefix": {"input_ids": torch.cat((PROMPT.repeat(3, 1), torch.arange(6).view(3, 2)), 1), "max_new_tokens": 4},
}


def _fails(how: str) -> None:
    """The way in which a rank ends, or its call does."""
    if how in ("is killed", "stops"):
        # The others have heard of it.
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL if how == "is killed" else signal.SIGSTOP)
    if how in ("is interrupted", "all are interrupted"):
        signal.raise_signal(signal.SIGINT)
    if how == "has no memory":
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
    raise KeyError("somebody's mistake")


def _after(count: int, how: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose call of this number fails, on rank 1 or on all."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and (rank() == 1 or how.startswith("all")):
            _fails(how)
        return function(*args, **kwargs)

    return counted


def generate_and_fail(path: str, when: str, how: str) -> str:
    """What a call, and the next one, raise when rank 1, or each, fails in the first.

    Args:
        when: "step" of the device's loop, "halves" of a prompt, or "prefix" that rows have in common.
        how: "raises", "has no memory", "is interrupted", "all are interrupted", "is killed" or "stops".
    """
    watch.POLL, watch.GRACE, watch.SILENT = 0.1, 1.0, 3.0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = load(path)
    with (
        reexecuted_loop() if model.device.type == "cpu" else contextlib.nullcontext(),
        fused_in_torch() if when == "halves" else contextlib.nullcontext(),
        hf_fastattn.patched(model, cuda_graphs=True, page_size=4),
        pytest.MonkeyPatch.context() as patch,
    ):
        if when == "halves":
            for name, value in (
                ("FEWEST_TOKENS", 8),
                ("FEWEST_PRODUCTS", 1),
                ("TILE", 24),
                ("most_tokens", lambda _: 0),
            ):
                patch.setattr(halves, name, value)
            own = model._fastattn.runtime.ranks
            later = WatchedSums(own._group, model.config.hidden_size)
            patch.setattr(own, "later_sums", lambda *_: later)
            patch.setattr(later, "room", _after(5, how, later.room))
        elif when == "prefix":
            patch.setattr(SharedPrompt, "_note", _after(1, how, SharedPrompt._note))
        else:
            patch.setattr(DecodeLoop, "_take", _after(10, how, DecodeLoop._take))
        first = _error_of(model, CALLS[when])
        return f"{first}; then {_error_of(model, {**CALLS['step'], 'max_new_tokens': 4})}"


def _error_of(model: Any, call: dict[str, Any]) -> str:
    try:
        one(model, {**call, "input_ids": call["input_ids"].to(model.device), "do_sample": False})
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
