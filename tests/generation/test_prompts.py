"""Prompts that come in chunks or as embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.generation.calls import SAMPLING, assert_same_tokens
from tests.tools.models import CORE, assert_fast, padded_batch, pair, real_tokens, single


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [1, 3])
def test_chunked_prefill(family: str, rows: int) -> None:
    stock, model = pair(family)
    batch = padded_batch(rows)
    assert_same_tokens(stock, model, batch, 24, prefill_chunk_size=8)
    assert_fast(model, real_tokens(batch))


def test_chunked_prefill_of_samples() -> None:
    stock, model = pair("qwen2_window")
    batch = padded_batch(2)
    assert_same_tokens(stock, model, batch, 12, prefill_chunk_size=8, num_return_sequences=3, **SAMPLING)
    assert_fast(model, real_tokens(batch), shared=True)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 3}])
def test_inputs_embeds(family: str, options: dict[str, Any]) -> None:
    stock, model = pair(family)
    if "num_return_sequences" in options:
        options = {**options, **SAMPLING}
    batch = padded_batch()
    embedded = {
        "inputs_embeds": stock.get_input_embeddings()(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
    }
    tokens = assert_same_tokens(stock, model, embedded, 24, **options)
    assert tokens.shape[1] == 24
    assert_fast(model, real_tokens(batch), shared=bool(options))


def test_inputs_embeds_with_ids() -> None:
    stock, model = pair("llama")
    batch = dict(padded_batch())
    batch["inputs_embeds"] = stock.get_input_embeddings()(batch["input_ids"]).detach()
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, real_tokens(batch))


def test_inputs_embeds_that_differ_are_not_taken_for_equal_rows() -> None:
    stock, model = pair("llama")
    embeds = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(3))
    embeds[1, :19] = embeds[0, :19]
    batch = {
        "input_ids": single(20)["input_ids"].repeat(2, 1),
        "attention_mask": torch.ones(2, 20, dtype=torch.long),
        "inputs_embeds": embeds,
    }
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, 40)
