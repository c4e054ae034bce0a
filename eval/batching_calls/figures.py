"""What is said of times: medians, 99th percentiles, what a long prompt does to rows beside it, what is wrong with a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import hf_fastattn
from hf_fastattn.eval.batching_calls.served import Served


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median and 99th percentile in ms; None of nothing."""
    if not seconds:
        return None
    median, most = np.percentile(np.asarray(seconds), (50, 99)).tolist()
    return {"median": 1e3 * median, "p99": 1e3 * most}


def load_figures(served: Served) -> dict[str, Any]:
    """Of requests that arrive: tokens a second, time between tokens, and time to the first token."""
    begin = min(output.created_time for output in served.outputs.values())
    end = max(output.lifespan[1] for output in served.outputs.values())
    return {
        "seconds": end - begin,
        "requests_s": len(served.outputs) / (end - begin),
        "tokens_s": served.tokens / (end - begin),
        "gap_ms": spread(served.gaps),
        "first_ms": spread(served.waits),
    }


def arrival_figures(served: Served) -> dict[str, Any]:
    """Of rows beside a long prompt, the last request: time between their tokens before it came, and while it is computed."""
    long = len(served.asks) - 1
    rows = [served.stamps(place) for place in range(long)]
    came, first = served.outputs[long].created_time, served.stamps(long)[0]
    # Before all rows decode, prompts are computed.
    start = max(stamps[0] for stamps in rows)
    pairs = [pair for stamps in rows for pair in zip(stamps, stamps[1:], strict=False)]
    # The step that is under way when the prompt arrives ends beside it.
    alone = spread([after - before for before, after in pairs if start <= before and (after < came or before > first)])
    beside = spread([after - before for before, after in pairs if after >= came and before <= first])
    found: dict[str, Any] = {"alone_ms": alone, "beside_ms": beside, "long_first_s": first - came, "slowest": None}
    if alone is not None and beside is not None:
        found["slowest"] = beside["p99"] / alone["median"]
    return found


def problems(model: Any, requests: int) -> list[str]:
    """Why the last requests of a patched model's manager do not count as served by ours; empty if they do."""
    shown = hf_fastattn.report(model)
    call = shown.last_call
    if call is None:
        return ["nothing was counted"]
    found = [f"fell back: {reason}" for reason in (*call.fallbacks, *call.not_looped)]
    if call.requests_batched != requests:
        found.append(f"{call.requests_batched} of {requests} requests were served in running batches")
    if model.device.type == "cuda" and not call.graphs_replayed:
        found.append(f"no step was replayed: {dict(call.uncaptured) or 'no reason is known'}")
    if shown.pages_in_use:
        found.append(f"{shown.pages_in_use} pages are still held")
    return found
