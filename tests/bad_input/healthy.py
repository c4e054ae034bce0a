"""A call under a fixed seed, and whether a model is as it should be after what went wrong."""

from __future__ import annotations

from typing import Any

import torch

import hf_fastattn
from tests.tools.models import assert_fast, padded_batch, real_tokens, single


def sample(model: Any, batch: Any = None, new: int = 12, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    batch = single() if batch is None else batch
    options = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "temperature": 1.5}
    return model.generate(**batch, **{**options, **kwargs})


def assert_healthy(stock: Any, model: Any) -> None:
    """No page is held, and the next calls are as in stock, to the state of the random generator."""
    assert hf_fastattn.report(model).pages_in_use == 0
    for options in ({}, {"num_return_sequences": 3}):
        expected = sample(stock, padded_batch(), **options)
        state = torch.get_rng_state()
        assert torch.equal(sample(model, padded_batch(), **options), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert_fast(model, real_tokens(padded_batch()))
