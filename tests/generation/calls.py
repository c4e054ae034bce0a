"""`generate()` of a stock and of a patched model, and whether the outputs are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 0}
Batch = Mapping[str, torch.Tensor]


def run(model: Any, batch: Batch, new: int = 24, **kwargs: Any) -> Any:
    """`generate()` under a fixed seed, greedy unless told otherwise."""
    torch.manual_seed(0)
    return model.generate(**batch, **{"max_new_tokens": new, "do_sample": False, **kwargs})


def assert_same_tokens(stock: Any, model: Any, batch: Batch, new: int = 24, **kwargs: Any) -> Any:
    """Same call, same tokens, and the random generator left in the same state; returns the tokens."""
    expected = run(stock, batch, new, **kwargs)
    state = torch.get_rng_state()
    tokens = run(model, batch, new, **kwargs)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.get_rng_state(), state)
    return tokens


def assert_fresh_rows(tokens: torch.Tensor, prompt_length: int) -> None:
    """The rows generated different tokens, so that a mix-up of rows could be seen."""
    new = tokens[:, prompt_length:]
    assert len({tuple(row.tolist()) for row in new}) == len(new)
    assert all(len(set(row.tolist())) > 8 for row in new)


def assert_close(ours: torch.Tensor, stock: torch.Tensor, what: str) -> None:
    assert ours.shape == stock.shape, (what, ours.shape, stock.shape)
    assert ours.dtype == stock.dtype, what
    finite = stock.isfinite()
    assert torch.equal(ours.isfinite(), finite), what
    error = (ours - stock)[finite].abs().max()
    assert error <= 1e-3, (what, error)
