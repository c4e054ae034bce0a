"""Calls that models over several processes are tested by, and what one process makes of them."""

from __future__ import annotations

from typing import Any

import torch

from tests.tools.models import padded_batch, pair_with_graphs, single, tiny
from tests.tools.reexecuted import reexecuted_loop

# End tokens that some rows meet early.
ENDS = list(range(10, 18))
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": 24, "seed": 3}


def calls_of(family: str) -> list[dict[str, Any]]:
    return [
        {**padded_batch(), "max_new_tokens": 24, "do_sample": False},
        {**padded_batch(9, 37), "max_new_tokens": 40, "do_sample": False, "eos_token_id": ENDS},
        {**padded_batch(), **SAMPLED},
        {**single(), **SAMPLED, "num_return_sequences": 5, "eos_token_id": ENDS},
        {**padded_batch(2), "max_new_tokens": 12, "num_beams": 3, "do_sample": False},
    ]


def one_process(family: str, calls: list[dict[str, Any]], **over: Any) -> list[torch.Tensor]:
    """Stock's tokens, and of samples, which are not stock's, those of a patched model."""
    stock, model = pair_with_graphs(family, **over)
    found = []
    with reexecuted_loop(), torch.no_grad():
        for call in calls:
            options = dict(call)
            torch.manual_seed(options.pop("seed", 0))
            found.append((model if options["do_sample"] else stock).generate(**options))
    return found


def stock_tokens(family: str, call: dict[str, Any]) -> torch.Tensor:
    """One unpatched process's tokens."""
    options = dict(call)
    torch.manual_seed(options.pop("seed", 0))
    with torch.no_grad():
        return tiny(family).generate(**options)


def assert_looped(call: Any) -> None:
    assert call.fast_loops == 1 and call.graphs_replayed > 0
    assert not call.fallbacks and not call.uncaptured and not call.not_looped, call
