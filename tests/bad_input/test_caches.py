"""Caches that do not fit the model, and caches that are full, say so and stay usable."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.bad_input.healthy import assert_healthy, sample
from tests.tools.models import assert_fast, padded_batch, pair, single, tiny

# Bytes of a page of 16 tokens over the 3 layers of the llama of tests/tools/models.py: K and V, 2 heads of 16, fp32.
PAGE_BYTES = 2 * 3 * 16 * 2 * 16 * 4


def filled(family: str = "llama", dtype: torch.dtype = torch.float32, **over: Any) -> Any:
    """A paged cache that holds the prompt of another model."""
    model = hf_fastattn.patch(tiny(family, **over).to(dtype))
    cache = hf_fastattn.PagedCache(model.config)
    with torch.no_grad():
        model(single()["input_ids"], **{CACHE: cache})
    return cache


OTHERS: dict[str, Callable[[], Any]] = {
    "kv heads, filled": lambda: filled(num_key_value_heads=4),
    "layers, filled": lambda: filled(num_hidden_layers=2),
    "more layers, filled": lambda: filled(num_hidden_layers=5),
    "windows, filled": lambda: filled("qwen2_window"),
    "dtype, filled": lambda: filled(dtype=torch.float64),
    "kv heads, empty": lambda: hf_fastattn.PagedCache(tiny("llama", num_key_value_heads=4).config),
    "layers, empty": lambda: hf_fastattn.PagedCache(tiny("llama", num_hidden_layers=2).config),
    "windows, empty": lambda: hf_fastattn.PagedCache(tiny("qwen2_window").config),
}


@pytest.mark.parametrize("what", OTHERS)
def test_cache_of_another_model(what: str) -> None:
    stock, model = pair("llama")
    cache = OTHERS[what]()
    length, pages = cache.get_seq_length(), cache.groups.pages_in_use
    batch = {"input_ids": torch.cat([single()["input_ids"], single(5, 3)["input_ids"]], 1)}
    with pytest.raises(ValueError, match=CACHE):
        sample(model, batch, **{CACHE: cache})
    assert cache.get_seq_length() == length
    assert cache.groups.pages_in_use == pages
    assert_healthy(stock, model)


def test_cache_of_another_batch_size() -> None:
    stock, model = pair("llama")
    cache = filled()
    with pytest.raises(ValueError, match=r"(?s)1 row.*3"), torch.no_grad():
        model(padded_batch()["input_ids"][:, :2], **{CACHE: cache})
    assert cache.get_seq_length() == 37
    assert_healthy(stock, model)


def test_cache_together_with_another_implementation() -> None:
    """Refused by Transformers itself."""
    _, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config)
    with pytest.raises(ValueError, match="cache_implementation"):
        sample(model, **{CACHE: cache}, cache_implementation="static")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "do_sample": False}])
def test_full_cache(options: dict[str, Any]) -> None:
    limit = 4 * PAGE_BYTES
    stock, model = pair("llama", {"memory_limit": limit})
    with pytest.raises(hf_fastattn.CacheFullError) as full:
        sample(model, single(), 64, **options)
    said = str(full.value)
    assert str(limit) in said and re.search(r"\b4 pages\b", said) and "64 tokens" in said
    assert hf_fastattn.report(model).pages_in_use == 0
    with pytest.raises(hf_fastattn.CacheFullError):
        sample(model, single(100), 4, **options)
    assert hf_fastattn.report(model).pages_in_use == 0
    # 37 tokens of the prompt and 27 of the answer are 64; the last one is not stored.
    assert torch.equal(sample(model, single(), 27), sample(stock, single(), 27))
    assert_fast(model, 37)
    with pytest.raises(hf_fastattn.CacheFullError):
        sample(model, single(), 29)


def test_samples_fit_where_copies_would_not() -> None:
    stock, model = pair("llama", {"memory_limit": 12 * PAGE_BYTES})
    # Two whole pages of prompt, shared, and one page for each of 8 answers; unshared it would be 24.
    options = {"num_return_sequences": 8}
    expected = sample(stock, single(32), 12, **options)
    assert torch.equal(sample(model, single(32), 12, **options), expected)
    assert_fast(model, 32, shared=True)


def test_full_cache_of_the_user_stays_usable() -> None:
    stock, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig(memory_limit=3 * PAGE_BYTES))
    ids = single(60)["input_ids"]
    with torch.no_grad():
        model(ids[:, :37], **{CACHE: cache})
        with pytest.raises(hf_fastattn.CacheFullError):
            model(ids[:, 37:], **{CACHE: cache})
        assert cache.get_seq_length() == 37 and cache.groups.pages_in_use == 3
        ours = model(ids[:, 37:48], **{CACHE: cache}).logits
        expected = stock(ids[:, :48]).logits[:, 37:]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_limit_below_one_page() -> None:
    _, model = pair("llama", {"memory_limit": 100})
    with pytest.raises(hf_fastattn.CacheFullError, match="100"):
        sample(model)
    assert hf_fastattn.report(model).pages_in_use == 0
