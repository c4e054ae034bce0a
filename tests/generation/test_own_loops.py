"""A user's own loops over `model(...)`, with and without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
)

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import Batch, assert_close
from tests.tools.models import CORE, VOCAB, assert_fast, padded_batch, pair


@torch.no_grad()
def manual_loop(model: Any, batch: Batch, cache: Any, steps: int = 12) -> torch.Tensor:
    """A user's own loop over `model(...)`; returns the logits `[steps, rows, vocab]`."""
    ids, mask, logits = batch["input_ids"], batch["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for _ in range(steps):
        out = model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
        logits.append(out.logits[:, -1])
        ids = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    assert out[CACHE] is cache
    return torch.stack(logits)


@pytest.mark.parametrize("family", CORE)
def test_manual_loop(family: str) -> None:
    stock, model = pair(family)
    cache = hf_fastattn.PagedCache(model.config)
    expected = manual_loop(stock, padded_batch(), DynamicCache(config=stock.config))
    assert_close(manual_loop(model, padded_batch(), cache), expected, "logits")
    assert cache.get_seq_length() == 37 + 11
    assert hf_fastattn.report(model).last_call.fallbacks == {}


@pytest.mark.parametrize("given", [(True, False), (False, True)])
@pytest.mark.parametrize("family", CORE)
def test_positions_given_to_some_forwards(family: str, given: tuple[bool, bool]) -> None:
    """Positions that a caller counts and those that the cache counts begin at the same number."""
    stock, model = pair(family)
    ids = torch.randint(1, VOCAB, (2, 26), generator=torch.Generator().manual_seed(8))
    found = []
    for side, cache in ((stock, DynamicCache(config=stock.config)), (model, hf_fastattn.PagedCache(model.config))):
        with torch.no_grad():
            for (begin, end), own in zip(((0, 20), (20, 26)), given, strict=True):
                positions = {"position_ids": torch.arange(begin, end)[None]} if own else {}
                out = side(ids[:, begin:end], **positions, **{CACHE: cache})
        found.append(out.logits)
    assert_close(found[1], found[0], "logits")
    assert hf_fastattn.report(model).last_call.fallbacks == {}


@pytest.mark.parametrize("family", CORE)
def test_cache_operations_of_a_manual_loop(family: str) -> None:
    """Crop, reorder, repeat and select between forwards, as stock's cache does."""
    stock, model = pair(family)
    logits = []
    for side, cache in (
        # Without a config it keeps every key, so that stock can crop in all versions.
        (stock, DynamicCache()),
        (model, hf_fastattn.PagedCache(model.config)),
    ):
        if hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        ids = torch.randint(1, VOCAB, (4, 30), generator=torch.Generator().manual_seed(8))
        with torch.no_grad():
            steps = [side(ids[:2, :20], **{CACHE: cache}).logits]
            cache.batch_repeat_interleave(2)
            steps.append(side(ids[:, 20:24], **{CACHE: cache}).logits)
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
            steps.append(side(ids[:, 24:27], **{CACHE: cache}).logits)
            cache.batch_select_indices(torch.tensor([2, 0]))
            steps.append(side(ids[:2, 27:], **{CACHE: cache}).logits)
        logits.append(steps)
    for ours, theirs in zip(logits[1], logits[0], strict=True):
        assert_close(ours, theirs, "logits")
    assert hf_fastattn.report(model).last_call.fallbacks == {}


@pytest.mark.parametrize("family", CORE)
def test_forward_without_a_cache(family: str) -> None:
    stock, model = pair(family)
    with torch.no_grad():
        expected = stock(**padded_batch(), use_cache=False)
        ours = model(**padded_batch(), use_cache=False)
        real = padded_batch()["attention_mask"].bool()
        assert_close(ours.logits[real], expected.logits[real], "logits")
        assert getattr(ours, CACHE) is None


@pytest.mark.parametrize("family", CORE)
def test_fallback_in_the_middle(family: str) -> None:
    """Attentions asked for between two forwards on pages: the cache serves both ways, padding included."""
    stock, model = pair(family, attn_implementation="eager")
    batch = padded_batch()
    more = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(6))
    found = []
    for side, cache in (
        (stock, DynamicCache(config=stock.config)),
        (model, hf_fastattn.PagedCache(model.config)),
    ):
        mask, steps = batch["attention_mask"], []
        with torch.no_grad():
            side(**batch, **{CACHE: cache})
            for lo, hi, asked in (
                (0, 1, False),
                (1, 2, True),
                (2, 5, True),
                (5, 6, False),
                (6, 8, False),
            ):
                mask = torch.cat([mask, mask.new_ones(3, hi - lo)], 1)
                out = side(
                    more[:, lo:hi],
                    attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1)[:, lo - hi :],
                    **{CACHE: cache},
                    output_attentions=asked,
                )
                steps.append(out.logits)
                if asked:
                    steps.extend(out.attentions)
        found.append(steps)
    assert len(found[1]) == len(found[0]) == 5 + 2 * 3
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_close(ours, theirs, "logits or attentions")
    assert_fast(model, held=None, fallbacks=("attention weights",))
