"""Unusual masks, empty prompts and wrong arguments: as in stock, or an error that says what was given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.bad_input.healthy import assert_healthy, sample
from tests.tools.models import CORE, VOCAB, assert_fast, padded_batch, pair, single


def assert_as_stock(batch: dict[str, torch.Tensor], family: str, **options: Any) -> None:
    """Patched and stock agree: on the tokens, or on the type of the error."""
    stock, model = pair(family)
    outcomes: list[Any] = []
    for side in (stock, model):
        try:
            outcomes.append(sample(side, batch, do_sample=False, **options))
        except Exception as error:
            outcomes.append(error)
    expected, ours = outcomes
    if isinstance(expected, Exception):
        assert isinstance(ours, (type(expected), ValueError)), (expected, ours)
    else:
        assert torch.is_tensor(ours), ours
        assert torch.equal(ours, expected)
    assert_healthy(stock, model)


def changed(rows: slice | int, columns: slice, value: int = 0) -> dict[str, torch.Tensor]:
    """The padded batch with a part of its mask set to `value`."""
    batch = padded_batch()
    batch["attention_mask"][rows, columns] = value
    return batch


ALL = slice(None)
MASKS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "holes in one row": lambda: changed(0, slice(12, 17)),
    "holes in all rows": lambda: changed(ALL, slice(31, 34)),
    "right padding of one row": lambda: changed(1, slice(33, None)),
    "right padding of all rows": lambda: changed(ALL, slice(35, None)),
    "hole before the last token": lambda: changed(ALL, slice(35, 36)),
    "one token": lambda: changed(2, slice(0, 36)),
}


@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize(("family", "beams"), [*((family, 1) for family in CORE), ("qwen2_window", 3)])
def test_unusual_masks(what: str, family: str, beams: int) -> None:
    assert_as_stock(MASKS[what](), family, num_beams=beams)


@pytest.mark.parametrize("family", CORE)
def test_empty_prompt_row(family: str) -> None:
    """As in stock, or an error that names the row; the other rows don't matter then."""
    stock, model = pair(family)
    batch = changed(2, ALL)
    try:
        tokens = sample(model, batch, do_sample=False)
    except ValueError as error:
        assert re.search(r"\b2\b", str(error)) and "attention_mask" in str(error)
    else:
        assert torch.equal(tokens, sample(stock, batch, do_sample=False))
    assert_healthy(stock, model)


def test_all_rows_empty() -> None:
    stock, model = pair("llama")
    batch = changed(ALL, ALL)
    try:
        tokens = sample(model, batch, do_sample=False)
    except ValueError as error:
        assert "attention_mask" in str(error)
    else:
        assert torch.equal(tokens, sample(stock, batch, do_sample=False))
    assert_healthy(stock, model)


@pytest.mark.parametrize("shape", [(3, 0), (0, 5)])
def test_empty_input(shape: tuple[int, int]) -> None:
    assert_as_stock({"input_ids": torch.zeros(shape, dtype=torch.long)}, "llama")


@pytest.mark.parametrize("new", [0, -1])
def test_no_new_tokens(new: int) -> None:
    assert_as_stock(padded_batch(), "llama", max_new_tokens=new)


def test_max_length_below_the_prompt() -> None:
    assert_as_stock(padded_batch(), "llama", max_new_tokens=None, max_length=20)


def test_mask_of_another_shape() -> None:
    batch = padded_batch()
    batch["attention_mask"] = batch["attention_mask"][:, :30]
    stock, model = pair("llama")
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        sample(model, batch)
    assert_healthy(stock, model)


def test_token_out_of_the_vocabulary() -> None:
    batch = single()
    batch["input_ids"][0, 5] = VOCAB + 3
    assert_as_stock(batch, "llama")


def test_unknown_generate_argument() -> None:
    assert_as_stock(padded_batch(), "llama", max_new_tokens=4, colour="red")


@pytest.mark.parametrize("family", CORE)
def test_bool_mask(family: str) -> None:
    batch = padded_batch()
    batch["attention_mask"] = batch["attention_mask"].bool()
    stock, model = pair(family)
    expected = sample(stock, padded_batch(), do_sample=False)
    with torch.no_grad():
        logits = model(**batch, **{CACHE: hf_fastattn.PagedCache(model.config)}).logits
    assert torch.equal(logits[:, -1].argmax(-1), expected[:, 37])
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
def test_four_dimensional_mask_falls_back(family: str) -> None:
    stock, model = pair(family)
    ids = padded_batch(2)["input_ids"].clamp_min(1)
    allowed = torch.ones(2, 1, 37, 37).tril().bool()
    allowed[:, :, 20:, 3:9] = False
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    masks: Any = bias
    if family == "qwen2_window":
        masks = {"full_attention": bias, "sliding_attention": bias}
    with torch.no_grad():
        expected = stock(ids, attention_mask=masks).logits
        cache = hf_fastattn.PagedCache(model.config)
        ours = model(ids, attention_mask=masks, **{CACHE: cache}).logits
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    fallbacks = hf_fastattn.report(model).last_call.fallbacks
    assert fallbacks and all("mask" in reason for reason in fallbacks)
