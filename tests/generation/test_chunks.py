"""Long prompts in pieces: the same tokens, from the same pages, and nothing kept of a prompt that fails half-way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.patches.decoder import chunked_prefill
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import run
from tests.tools.models import assert_fast, padded_batch, pair, real_tokens

FAMILIES = ("llama", "qwen2_window", "mistral_window", "qwen3", "qwen3_moe")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_prefill, "CPU_TOKENS", 24)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_equal_stock(family: str, rows: int) -> None:
    stock, model = pair(family)
    batch = padded_batch(rows)
    assert torch.equal(run(model, batch, 20), run(stock, batch, 20))
    call = assert_fast(model, real_tokens(batch))
    pieces = -(-37 // (24 // rows))
    assert call.forwards == pieces + 19


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_later_turn(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    caches = [hf_fastattn.PagedCache(model.config), None]
    turns = []
    for candidate, cache in zip((model, stock), caches, strict=True):
        options: dict[str, Any] = {"return_dict_in_generate": True, **({CACHE: cache} if cache else {})}
        first = run(candidate, batch, 8, **options)
        more = torch.cat((first.sequences, torch.full((3, 40), 5)), 1)
        mask = torch.cat((batch["attention_mask"], torch.ones(3, 48, dtype=torch.long)), 1)
        again = {"input_ids": more, "attention_mask": mask}
        turns.append(run(candidate, again, 8, **{CACHE: first[CACHE]}))
    assert torch.equal(*turns)


def test_a_failure_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config)
    ids = padded_batch(1)["input_ids"]
    commit, calls = hf_fastattn.PagedCache.commit, []

    def fail_at_the_fifth(self: Any, *args: Any, **kwargs: Any) -> None:
        commit(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("stop")

    with torch.no_grad():
        want = model(ids, **{CACHE: cache}).logits
        for past in (0, 37):
            cache = hf_fastattn.PagedCache(model.config)
            if past:
                model(ids, **{CACHE: cache})
            calls.clear()
            with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
                patch.setattr(hf_fastattn.PagedCache, "commit", fail_at_the_fifth)
                model(ids.repeat(1, 5), **{CACHE: cache})
            assert cache.get_seq_length() == past
            assert torch.allclose(model(ids, **{CACHE: cache}).logits[:, -1:], want[:, -1:]) or past


def test_hidden_states_of_all_pieces_are_returned() -> None:
    stock, model = pair("qwen2")
    batch = padded_batch()
    with torch.no_grad():
        want = stock(**batch).logits
        ours = model(**batch, **{CACHE: hf_fastattn.PagedCache(model.config)}).logits
    shown = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[shown], want[shown], atol=1e-4, rtol=1e-4)
