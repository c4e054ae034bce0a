"""Tokens that a later mask hides although they are cached: taken out of pages, not recomputed; and shown again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import VOCAB, assert_fast, padded_batch, pair, tiny

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral")


def chat(model: Any, turns: int = 3, copies: int = 1, **options: Any) -> list[torch.Tensor]:
    """Turns of a batch whose rows end at different times: what was generated after a row's end is hidden in later turns."""
    batch = padded_batch()
    ids, mask, cache, said = batch["input_ids"].repeat(copies, 1), batch["attention_mask"].repeat(copies, 1), None, []
    for turn in range(turns):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, return_dict_in_generate=True,
            **({} if cache is None else {CACHE: cache}), **options,
        )  # fmt: skip
        cache, new = out[CACHE], out.sequences[:, ids.shape[1] :]
        said.append(new)
        # Row b ended b tokens early; the user's next words follow in every row.
        shown = torch.ones_like(new)
        for row in range(len(new)):
            shown[row, 9 - row :] = 0
        words = torch.randint(1, VOCAB, (len(new), 5), generator=torch.Generator().manual_seed(turn))
        ids, mask = torch.cat((out.sequences, words), 1), torch.cat((mask, shown, torch.ones_like(words)), 1)
    return said


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_chat_whose_rows_end_early(family: str, page_size: int) -> None:
    stock, model = pair(family, {"page_size": page_size})
    for ours, theirs in zip(chat(model), chat(stock), strict=True):
        assert torch.equal(ours, theirs)
    assert_fast(model, held=None)


def test_a_window_counts_hidden_tokens() -> None:
    stock, model = pair("qwen2_window")
    for ours, theirs in zip(chat(model), chat(stock), strict=True):
        assert torch.equal(ours, theirs)
    call = hf_fastattn.report(model).last_call
    assert call is not None and set(call.fallbacks) == {"the mask hides tokens that are cached"}


def test_samples_go_on_sharing_their_prompt() -> None:
    """Only the pages from a row's first hidden token on are its own."""
    stock, model = pair("llama", {"page_size": 4})
    ours, theirs = chat(model, 2, 4), chat(stock, 2, 4)
    assert all(map(torch.equal, ours, theirs))
    model = hf_fastattn.patch(copy.deepcopy(model), page_size=4)
    batch = {name: value[:1] for name, value in padded_batch(1).items()}
    out = model.generate(**batch, max_new_tokens=9, do_sample=True, num_return_sequences=8, return_dict_in_generate=True)
    before = hf_fastattn.report(model).pages_in_use
    mask = torch.cat((batch["attention_mask"].repeat(8, 1), torch.ones(8, 9, dtype=torch.long)), 1)
    mask[:4, -3:] = 0
    words = torch.full((8, 2), 7)
    with torch.no_grad():
        model(words, attention_mask=torch.cat((mask, torch.ones_like(words)), 1), **{CACHE: out[CACHE]})
    assert hf_fastattn.report(model).pages_in_use <= before + 8
    assert_fast(model, held=None)


@pytest.mark.parametrize("page_size", [4, 16])
def test_hidden_tokens_are_shown_again(page_size: int) -> None:
    """Masks of a user's own loop, each hiding other tokens; keys read from outside are all there."""
    stock, model = pair("llama", {"page_size": page_size})
    batch, generator = padded_batch(), torch.Generator().manual_seed(4)
    caches: list[Any] = [None, hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig(page_size=page_size))]
    real = batch["attention_mask"].bool()
    mask, parts = batch["attention_mask"], [[], []]
    for step in range(8):
        tokens = batch["input_ids"] if not step else torch.randint(1, VOCAB, (3, 3), generator=generator)
        if step:
            mask = torch.cat((mask, torch.ones_like(tokens)), 1)
        given = mask.clone()
        if step in (2, 3, 5, 6):
            hidden = torch.rand(mask.shape, generator=generator) < 0.2
            hidden[:, -4:] = False
            given[hidden] = 0
        for index, side in enumerate((stock, model)):
            cache = {} if caches[index] is None else {CACHE: caches[index]}
            with torch.no_grad():
                out = side(tokens, attention_mask=given, use_cache=True, **cache)
            caches[index] = out[CACHE]
            parts[index].append(out.logits[real] if not step else out.logits)
        if step == 6:
            caches[1].crop(-2)
            caches[0].crop(-2)
            mask = mask[:, :-2]
        if step == 4:
            caches = [copy.deepcopy(cache) for cache in caches]
    for ours, theirs in zip(parts[1], parts[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        where = torch.nn.functional.pad(real, (0, ours.keys.shape[2] - real.shape[1]), value=True)
        for name in ("keys", "values"):
            a, b = (getattr(layer, name).transpose(1, 2)[where] for layer in (ours, theirs))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert hf_fastattn.report(model).last_call.fallbacks == {}


@pytest.mark.parametrize("lent", [False, True])
def test_a_call_of_more_rows_than_the_cache_fails_and_the_next_one_works(lent: bool) -> None:
    """Beams over a padded cache of fewer rows: stock fails as well, and goes on."""
    stock, model = pair("llama")
    batch = padded_batch()
    batch["attention_mask"][:, :3] = 0
    options = {CACHE: DynamicCache(config=model.config)} if lent else {"return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=8, do_sample=False, **options)
    cache, said = (options[CACHE], first) if lent else (first[CACHE], first.sequences)
    more = torch.cat((said, torch.full((3, 1), 5)), 1)
    mask = torch.ones_like(more)
    mask[:, :37] = batch["attention_mask"]
    with pytest.raises(ValueError, match="holds 3 rows, but the batch has 9"):
        model.generate(more, attention_mask=mask, do_sample=False, num_beams=3, max_new_tokens=4, **{CACHE: cache})
    ours, theirs = (side.generate(**batch, max_new_tokens=4, do_sample=False) for side in (model, stock))
    assert torch.equal(ours, theirs)


def test_only_hidden_tokens_are_kept_aside() -> None:
    model = hf_fastattn.patch(tiny("llama"), page_size=4)
    batch = padded_batch(3, 37)
    cache = hf_fastattn.PagedCache(model.config)
    mask = batch["attention_mask"].clone()
    with torch.no_grad():
        model(**batch, **{CACHE: cache})
        mask[0, 30], mask[1, 31:33] = 0, 0
        for _ in range(2):
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1)
            model(torch.full((3, 1), 7), attention_mask=mask, **{CACHE: cache})
    assert [len(hidden.keys) for hidden in cache.hidden.values()] == [3, 3, 3]
