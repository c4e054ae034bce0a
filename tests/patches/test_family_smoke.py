"""The shortest check that a family works: padded greedy, beams and samples as in stock, on our path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from tests.tools.models import FAMILIES, assert_fast, padded_batch, pair, real_tokens

# A window read one key too short or too long shows after 16 of them in every family.
NEW = 20
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 2},
    "samples": {"do_sample": True, "temperature": 2.0, "top_k": 0, "num_return_sequences": 3},
}


def generate(model: Any, batch: dict[str, torch.Tensor], call: str) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, max_new_tokens=NEW, **CALLS[call])


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    for call in CALLS:
        expected = generate(stock, batch, call)
        assert torch.equal(generate(model, batch, call), expected), call
        counters = assert_fast(model, real_tokens(batch), shared=call != "greedy")
        assert counters.forwards == NEW
    hf_fastattn.unpatch(model)
    assert torch.equal(generate(model, batch, call), expected)
