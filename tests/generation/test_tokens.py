"""Greedy search, beams and sampling of a patched model give stock's tokens, and our path did the work."""

from __future__ import annotations

import pytest
import torch

from tests.generation.calls import SAMPLING, assert_fresh_rows, assert_same_tokens
from tests.tools.models import CORE, assert_fast, padded_batch, pair, real_tokens


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("family", CORE)
def test_greedy(family: str, page_size: int) -> None:
    stock, model = pair(family, {"page_size": page_size})
    batch = padded_batch()
    tokens = assert_same_tokens(stock, model, batch, 64)
    assert_fresh_rows(tokens, 37)
    call = assert_fast(model, real_tokens(batch), shared=False)
    assert call.forwards == 64


@pytest.mark.parametrize("family", CORE)
def test_four_beams(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    tokens = assert_same_tokens(stock, model, batch, 64, num_beams=4)
    assert_fresh_rows(tokens, 37)
    call = assert_fast(model, real_tokens(batch), shared=True)
    assert call.forwards == 64


@pytest.mark.parametrize("family", CORE)
def test_sampling(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    assert_same_tokens(stock, model, batch, 64, **SAMPLING)
    assert_fast(model, real_tokens(batch), shared=False)
    assert_same_tokens(stock, model, batch, 8, do_sample=True, top_k=5, top_p=0.9)


def test_eager_model_takes_the_fast_path() -> None:
    stock, model = pair("qwen2_window", attn_implementation="eager")
    batch = padded_batch()
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, real_tokens(batch))


@pytest.mark.parametrize("family", CORE)
def test_no_mask_given(family: str) -> None:
    stock, model = pair(family)
    batch = {"input_ids": padded_batch(2)["input_ids"].clamp_min(1)}
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, 74)


@pytest.mark.parametrize("family", CORE)
def test_one_token_prompts(family: str) -> None:
    stock, model = pair(family)
    batch = {"input_ids": torch.tensor([[5], [6]])}
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, 2)


def test_repeated_calls_reuse_the_pool() -> None:
    stock, model = pair("qwen2_window")
    for seed in range(4):
        batch = padded_batch(2 + seed % 2, 20 + 9 * seed, seed)
        assert_same_tokens(stock, model, batch, 12, num_beams=1 + seed % 3)
        assert_fast(model, real_tokens(batch))
