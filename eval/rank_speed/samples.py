"""Samples of prompts, of a model that is spread over ranks: each prompt computed and read once, and once for each sample."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

import hf_fastattn
from hf_fastattn.eval.generate_speed.cases import TOP_K, Case
from hf_fastattn.eval.parallel_calls.systems import loop_seconds, wait

WAYS = ("shared", "alone")
# Calls of each way that are not timed: the first compiles kernels and makes pages, the next one records over them.
WARM_UP = 2
# Tokens of a loop behind which its steps are steady: kernels are compiled and steps recorded before, and read-backs lag.
FIRST_TOKENS = 8


class Measured(NamedTuple):
    """One call, in ms: to the first token; a token of the steady loop; and of all of it, records of steps included."""

    first: float
    token: float
    whole_token: float


def measure_samples(
    model: Any, case: Case, samples: int, new: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """A record of a case; every rank of a patched model calls it at the same time.

    Args:
        case: its prompts.
        samples: of each prompt.
        new: tokens of a call after the first one.
        rounds: timed calls each way, in alternating order; one of each way is a pair.
    """
    times: dict[str, list[Measured]] = {way: [] for way in WAYS}
    counted: dict[str, dict[str, int]] = {way: {"computed": 0, "recorded": 0} for way in WAYS}
    for number in range(WARM_UP + rounds):
        for way in WAYS if number % 2 else WAYS[::-1]:
            measured = _call(model, case, samples, new, number, way == "shared")
            call = hf_fastattn.report(model).last_call
            assert call is not None
            counted[way]["computed"] = call.prompt_tokens
            if number >= WARM_UP:
                times[way].append(measured)
                counted[way]["recorded"] += call.graphs_captured
            if not call.fast_loops and model.device.type == "cuda":
                raise RuntimeError(f"the loop did not run on the device: {dict(call.not_looped)}")
    found: dict[str, Any] = {"prompts": case.rows, "prompt": case.prompt, "samples": samples}
    for way in WAYS:
        first, token, whole = (statistics.median(values) for values in zip(*times[way], strict=True))
        found[way] = {"first_ms": first, "token_ms": token, "whole_token_ms": whole, **counted[way], "timings": times[way]}
    pairs = list(zip(times["shared"], times["alone"], strict=True))
    # What disturbs a machine disturbs both calls of a pair.
    for name, field in (("first_ratio", "first"), ("token_ratio", "token")):
        found[name] = statistics.median(getattr(one, field) / getattr(other, field) for one, other in pairs)
    shown = "; ".join(f"{way} {_shown(found[way])}" for way in WAYS)
    say(f"{case.name}, {samples} samples: {shown}; a token in {found['token_ratio']:.3f} of alone's time")
    return found


def _call(model: Any, case: Case, samples: int, new: int, number: int, shares: bool) -> Measured:
    """One call on prompts of its own."""
    ids = case.ids(model.config.get_text_config().vocab_size, number, model.device)
    runtime = model._fastattn.runtime
    before, runtime.shares_rows = runtime.shares_rows, shares
    torch.manual_seed(number)
    try:
        dist.barrier()
        wait(model.device)
        start = time.perf_counter()
        with arrivals(model.device) as came, loop_seconds(model.device) as loops:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=1 + new, do_sample=True, top_k=TOP_K,
                num_return_sequences=samples,
            )  # fmt: skip
        wait(model.device)
        whole = time.perf_counter() - start
    finally:
        runtime.shares_rows = before
    # Without a GPU the loop is not timed: all is of the whole call.
    steps = sum(loops) if loops else whole * new / (1 + new)
    return Measured(1e3 * (whole - steps), 1e3 * steady(came, steps / new), 1e3 * steps / new)


def steady(came: list[float], otherwise: float) -> float:
    """Seconds between the tokens of two steps, the median behind the first ones; `otherwise` of a loop of too few."""
    later = came[FIRST_TOKENS:]
    return statistics.median(b - a for a, b in zip(later, later[1:], strict=False)) if len(later) > 1 else otherwise


@contextmanager
def arrivals(device: torch.device) -> Iterator[list[float]]:
    """When the tokens of each step came to the host, of loops that run on the device meanwhile."""
    found: list[float] = []
    if device.type != "cuda":
        yield found
        return
    # Not before: it imports Triton.
    from hf_fastattn.loop.decode_loop import DecodeLoop

    receive = DecodeLoop._receive

    def stamped(loop: Any, waits: bool) -> Any:
        arrived = receive(loop, waits)
        if arrived is not None:
            found.append(time.perf_counter())
        return arrived

    with mock.patch.object(DecodeLoop, "_receive", stamped):
        yield found


def _shown(figures: dict[str, Any]) -> str:
    words = f"first {figures['first_ms']:.1f} ms, a token {figures['token_ms']:.2f} ms, {figures['computed']} computed"
    return f"{words}, {figures['recorded']} steps recorded" if figures["recorded"] else words
