"""Models that put a tower before a decoder of ours: images and sound, padding, and stock's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from tests.tools.composites import COMPOSITES, composite, media_batch
from tests.tools.models import assert_fast, real_tokens

DRAWS = {"do_sample": True, "temperature": 2.0, "top_k": 0}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "samples": {**DRAWS, "num_return_sequences": 3},
    "draws": DRAWS,
}


def generate(model: Any, batch: dict[str, torch.Tensor], call: str) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, max_new_tokens=16, **CALLS[call])


@pytest.mark.parametrize("name", COMPOSITES)
def test_composite(name: str) -> None:
    stock, model = composite(name), hf_fastattn.patch(composite(name))
    batch = media_batch(name)
    for call in ("greedy", "samples"):
        expected = generate(stock, batch, call)
        assert torch.equal(generate(model, batch, call), expected), call
        counters = assert_fast(model, real_tokens(batch), shared=call != "greedy")
        assert counters.forwards == 16
    main = COMPOSITES[name].main
    other = generate(model, {**batch, main: batch[main].flip(0)}, call)
    assert not torch.equal(other, expected)
    hf_fastattn.unpatch(model)
    assert torch.equal(generate(model, batch, call), expected)


@pytest.mark.parametrize("name", COMPOSITES)
def test_repeated_rows_are_computed_once(name: str) -> None:
    """As a trainer repeats prompts: equal neighbours, images and all, without `num_return_sequences`."""
    stock, model = composite(name), hf_fastattn.patch(composite(name))
    repeated = media_batch(name, (0, 0, 1, 1, 0, 2))
    assert torch.equal(generate(model, repeated, "draws"), generate(stock, repeated, "draws"))
    assert_fast(model, real_tokens(media_batch(name)), shared=True)


@pytest.mark.parametrize("name", COMPOSITES)
def test_equal_texts_about_different_images(name: str) -> None:
    stock, model = composite(name), hf_fastattn.patch(composite(name))
    batch = media_batch(name, (0, 2, 2))
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert torch.equal(generate(model, batch, "draws"), generate(stock, batch, "draws"))
    assert_fast(model, real_tokens(media_batch(name, (0, 2))), shared=True)
