"""Samples of prompts, of a model that is spread over ranks: each prompt computed and read once, and once for each sample."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import hf_fastattn
from hf_fastattn.eval.generate_speed.cases import TOP_K, Case
from hf_fastattn.eval.parallel_calls.systems import loop_seconds, wait

WAYS = ("shared", "alone")


def measure_samples(
    model: Any, case: Case, samples: int, new: int, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """A record of a case; every rank of a patched model calls it at the same time.

    Args:
        case: its prompts.
        samples: of each prompt.
        new: tokens of a call after the first one.
        rounds: timed calls each way, in alternating order.
    """
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    computed: dict[str, int] = {}
    for number in range(1 + rounds):
        for way in WAYS if number % 2 else WAYS[::-1]:
            first, token = _call(model, case, samples, new, number, way == "shared")
            # The first call compiles and records.
            if number:
                times[way].append((first, token))
            call = hf_fastattn.report(model).last_call
            assert call is not None
            computed[way] = call.prompt_tokens
            if not call.fast_loops and model.device.type == "cuda":
                raise RuntimeError(f"the loop did not run on the device: {dict(call.not_looped)}")
    found: dict[str, Any] = {"prompts": case.rows, "prompt": case.prompt, "samples": samples}
    for way in WAYS:
        first, token = (statistics.median(values) for values in zip(*times[way], strict=True))
        found[way] = {"first_ms": first, "token_ms": token, "computed": computed[way], "timings": times[way]}
    say(f"{case.name}, {samples} samples: " + "; ".join(f"{way} {_shown(found[way])}" for way in WAYS))
    return found


def _call(model: Any, case: Case, samples: int, new: int, number: int, shares: bool) -> tuple[float, float]:
    """Milliseconds to the first token, and of a token after it, of one call on prompts of its own."""
    ids = case.ids(model.config.get_text_config().vocab_size, number, model.device)
    runtime = model._fastattn.runtime
    before, runtime.shares_rows = runtime.shares_rows, shares
    torch.manual_seed(number)
    try:
        dist.barrier()
        wait(model.device)
        start = time.perf_counter()
        with loop_seconds(model.device) as loops:
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
    return 1e3 * (whole - steps), 1e3 * steps / new


def _shown(figures: dict[str, Any]) -> str:
    return f"first {figures['first_ms']:.1f} ms, a token {figures['token_ms']:.2f} ms, {figures['computed']} computed"
