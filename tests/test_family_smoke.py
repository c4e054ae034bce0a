"""The shortest check that a family works: padded greedy and beams as in stock, on our path."""

from __future__ import annotations

import pytest
import torch

import hf_fastattn
from tests.models import FAMILIES, assert_fast, padded_batch, pair, real_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    for beams in (1, 2):
        options = {"max_new_tokens": 32, "do_sample": False, "num_beams": beams}
        expected = stock.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, **options), expected)
        assert_fast(model, real_tokens(batch), shared=beams > 1)
    hf_fastattn.unpatch(model)
    assert torch.equal(model.generate(**batch, **options), expected)
