"""`fork`, `truncate` and `append` on caches by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import VOCAB, padded_batch, pair


def test_a_fork_shares_pages_and_leaves_the_other_alone() -> None:
    stock, model = pair("llama")
    batch = padded_batch(3, 40)
    cache = hf_fastattn.PagedCache(model.config)
    logits = hf_fastattn.append(model, cache, batch["input_ids"], batch["attention_mask"])
    pages = hf_fastattn.report(model).pages_in_use
    order = [2, 0, 0, 1]
    forked = hf_fastattn.fork(cache, order)
    assert hf_fastattn.report(model).pages_in_use == pages
    new = torch.randint(1, VOCAB, (4, 5), generator=torch.Generator().manual_seed(3))
    found = hf_fastattn.append(model, forked, new, logits_to_keep=0)
    ids = torch.cat((batch["input_ids"][order], new), 1)
    mask = torch.cat((batch["attention_mask"][order], torch.ones_like(new)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = stock(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(found, expected[:, -5:], atol=1e-3)
    assert torch.allclose(logits[order], expected[:, -6:-5], atol=1e-3)
    assert (cache.get_seq_length(), forked.get_seq_length()) == (40, 45)
    # Rows of the first go on as if nothing had been forked.
    again = hf_fastattn.append(model, cache, new[:3])
    mine = torch.cat((batch["input_ids"], new[:3]), 1)
    mask = torch.cat((batch["attention_mask"], torch.ones_like(new[:3])), 1)
    expected = stock(mine, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    assert torch.allclose(again[:, -1], expected, atol=1e-3)
    hf_fastattn.append(model, hf_fastattn.truncate(cache, 40), new[:3, :4])
    assert torch.allclose(hf_fastattn.append(model, cache, new[:3, 4:])[:, -1], expected, atol=1e-3)
    cache.reset()
    forked.reset()
    assert hf_fastattn.report(model).pages_in_use == 0


def test_generate_goes_on_from_forked_rows() -> None:
    stock, model = pair("qwen2")
    prompt = padded_batch(1, 33)["input_ids"]
    cache = hf_fastattn.PagedCache(model.config)
    hf_fastattn.append(model, cache, prompt[:, :-1])
    for count in (1, 3):
        ids = prompt.repeat(count, 1)
        forked = hf_fastattn.fork(cache, [0] * count)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: forked}, **options)
        assert hf_fastattn.report(model).last_call.prompt_tokens == count
        assert torch.equal(tokens, stock.generate(ids, attention_mask=torch.ones_like(ids), **options))
        forked.reset()


def test_truncate_to_nothing_and_to_all() -> None:
    model = pair("llama")[1]
    cache = hf_fastattn.PagedCache(model.config)
    hf_fastattn.append(model, cache, padded_batch(1, 20)["input_ids"])
    assert hf_fastattn.truncate(cache, 20).get_seq_length() == 20
    assert hf_fastattn.truncate(cache, 0).get_seq_length() == 0
    assert hf_fastattn.report(model).pages_in_use == 0


def test_what_is_wrong_is_named() -> None:
    model = pair("llama")[1]
    cache = hf_fastattn.PagedCache(model.config)
    with pytest.raises(ValueError, match="numbers of the cache's 0 rows"):
        hf_fastattn.fork(cache, [0])
    hf_fastattn.append(model, cache, padded_batch(2, 20)["input_ids"])
    with pytest.raises(ValueError, match=r"indices=\[2\] must be numbers of the cache's 2 rows"):
        hf_fastattn.fork(cache, [2])
    with pytest.raises(ValueError, match="length=21 must lie between 0 and the cache's 20 columns"):
        hf_fastattn.truncate(cache, 21)
    with pytest.raises(ValueError, match=r"3 rows and the cache 2; fork\(\) the cache first"):
        hf_fastattn.append(model, cache, padded_batch(3, 5)["input_ids"])
    with pytest.raises(TypeError, match=r"a DynamicCache; make one with hf_fastattn\.PagedCache"):
        hf_fastattn.fork(DynamicCache(config=model.config), [0])
