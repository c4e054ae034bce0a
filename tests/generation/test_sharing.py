"""Each distinct prompt is computed and stored once; a window gives its pages back."""

from __future__ import annotations

import pytest
import torch

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import SAMPLING, assert_fresh_rows, assert_same_tokens, run
from tests.tools.models import CORE, assert_fast, padded_batch, pair, real_tokens, single


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [1, 3])
def test_samples_share_the_prompt(family: str, rows: int) -> None:
    stock, model = pair(family)
    batch = padded_batch(rows)
    tokens = assert_same_tokens(stock, model, batch, 24, num_return_sequences=8, **SAMPLING)
    assert_fresh_rows(tokens, 37)
    assert_fast(model, real_tokens(batch), shared=True)


def test_samples_copy_only_the_last_page() -> None:
    stock, model = pair("llama", {"page_size": 16})
    batch = single(37)
    assert_same_tokens(stock, model, batch, 8, num_return_sequences=8, **SAMPLING)
    call = assert_fast(model, 37, shared=True)
    # 3 pages of the prompt, then at most a copy of the last one for all samples: none needs a 4th page.
    assert call.pages_allocated <= 3 + 8
    assert call.pages_copied <= 8


def test_a_sliding_window_gives_pages_back() -> None:
    stock, model = pair("qwen2_window", {"page_size": 4}, max_window_layers=0)
    cache = hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig(page_size=4))
    expected = run(stock, single(), 64)
    tokens = run(model, single(), 64, **{CACHE: cache})
    assert torch.equal(tokens, expected)
    # A window of 24 keys spans at most 7 pages of 4 tokens; 100 tokens would take 25.
    assert_fast(model, 37, held=None)
    assert 6 <= cache.groups.pages_in_use <= 7


@pytest.mark.parametrize("family", CORE)
def test_beams_with_return_sequences(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    options = {"num_beams": 4, "num_return_sequences": 3}
    assert_same_tokens(stock, model, batch, 32, **options)
    assert_fast(model, real_tokens(batch), shared=True)
    assert_same_tokens(stock, model, batch, 16, do_sample=True, **options)
    assert_fast(model, real_tokens(batch), shared=True)


@pytest.mark.parametrize("family", CORE)
def test_identical_rows_are_computed_once(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    order = torch.tensor([0, 1, 0, 2, 1, 0])
    repeated = {name: value[order] for name, value in batch.items()}
    assert_same_tokens(stock, model, repeated, 32, **SAMPLING)
    assert_fast(model, real_tokens(batch), shared=True)


def test_identical_rows_of_different_padding() -> None:
    stock, model = pair("llama")
    one = single(20)["input_ids"]
    ids = torch.cat([torch.cat([torch.zeros(1, 5, dtype=one.dtype), one[:, 5:]], 1), one])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert_same_tokens(stock, model, {"input_ids": ids, "attention_mask": mask}, 24)
    assert_fast(model, 35)


@pytest.mark.parametrize("order", [[0, 0], [0, 1]])
def test_rows_that_differ_only_in_padding_tokens(order: list[int]) -> None:
    """What stands under the mask must not matter."""
    stock, model = pair("qwen2")
    ids = single(20)["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    ids[0, :5], ids[1, :5] = 7, 9
    assert_same_tokens(stock, model, {"input_ids": ids[order], "attention_mask": mask}, 24)
    assert_fast(model)
