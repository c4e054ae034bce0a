"""Ctrl-C, failures and full memory where rows and calls share pages: no page is lost, and the next call is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.generation import prefix_call
from hf_fastattn.pages.page_pool import CacheFullError
from tests.bad_input.interrupting import interrupted
from tests.bad_input.test_every_moment import moments
from tests.tools.models import VOCAB, assert_fast, pair, tiny

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
# Bytes of a page of 4 tokens: 2 layers, keys and values, 2 heads of 8 in fp32.
PAGE = 2 * 2 * 4 * 2 * 8 * 4


@pytest.fixture(autouse=True)
def anything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_call, "WORTH_ON_CPU", 1)


def prompts(seed: int) -> dict[str, torch.Tensor]:
    """Three rows of one document, with other questions for other seeds."""
    made = torch.Generator().manual_seed(seed)
    document = torch.randint(1, VOCAB, (1, 14), generator=torch.Generator().manual_seed(9)).expand(3, -1)
    ids = torch.cat((document, torch.randint(1, VOCAB, (3, 5), generator=made)), 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, seed: int) -> torch.Tensor:
    return model.generate(**prompts(seed), max_new_tokens=6, do_sample=False)


def assert_books_agree(model: Any) -> None:
    """Pages are held by the index alone."""
    report, runtime = hf_fastattn.report(model), model._fastattn.runtime
    assert report.pages_in_use == report.pages_kept
    assert runtime._calls == [] and not runtime.prefilling
    for group in runtime.groups:
        pool = group.pool
        assert not pool.unsettled and sum(pool._held) == sum(pool._owners) == pool.in_use == report.pages_kept


@pytest.mark.parametrize("event", ["opcode", "line"])
@pytest.mark.parametrize("options", [{}, {"prefix_cache": True}, {"prefix_cache": True, "memory_limit": 26 * PAGE}])
def test_ctrl_c(options: dict[str, Any], event: str) -> None:
    stock, model = tiny("llama", **SMALL), hf_fastattn.patch(tiny("llama", **SMALL), page_size=4, **options)
    expected = [generate(stock, seed) for seed in range(3)]
    assert torch.equal(generate(model, 0), expected[0])
    assert assert_fast(model, held=None).tokens_reused > 0
    for number, moment in enumerate(moments(lambda: generate(model, 1), event)):
        with interrupted(moment, event) as interrupter:
            try:
                generate(model, number % 3)
            except KeyboardInterrupt:
                pass
        assert_books_agree(model)
        again = number % 2 + 1
        assert torch.equal(generate(model, again), expected[again]), (moment, interrupter.where)
        assert_fast(model, held=None)
        assert_books_agree(model)
        if number % 5 == 4:
            hf_fastattn.release_memory(model)
            assert hf_fastattn.report(model).page_bytes_allocated == 0


def test_a_full_pool_lets_go_of_what_stays_before_it_fails() -> None:
    stock, model = pair("llama", {"page_size": 4, "prefix_cache": True, "memory_limit": 30 * PAGE}, **SMALL)
    for seed in range(4):
        assert torch.equal(generate(model, seed), generate(stock, seed))
    with pytest.raises(CacheFullError, match="the cache is full"):
        model.generate(torch.arange(1, 120)[None], max_new_tokens=9, do_sample=False)
    assert_books_agree(model)
    assert torch.equal(generate(model, 1), generate(stock, 1))
    assert_books_agree(model)


def test_short_memory_takes_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device has no memory for more pages, those that stay make room."""
    from hf_fastattn.cache import prefix_store
    from hf_fastattn.pages.page_storage import PageStorage

    monkeypatch.setattr(prefix_store, "SPARE_TOKENS", 0)
    stock, model = pair("llama", {"page_size": 4, "prefix_cache": True}, **SMALL)
    generate(model, 0)
    kept, grown = hf_fastattn.report(model).pages_kept, PageStorage._grown
    failures: list[int] = []

    def short(old: Any, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if not failures:
            failures.append(shape[0])
            raise torch.OutOfMemoryError("no memory")
        return grown(old, shape, like)

    monkeypatch.setattr(PageStorage, "_grown", staticmethod(short))
    ids = torch.randint(1, VOCAB, (4, 30), generator=torch.Generator().manual_seed(2))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    tokens = [one.generate(ids, **options) for one in (stock, model)]
    assert torch.equal(*tokens) and failures and kept
    assert model._fastattn.runtime.counters.prefix_pages_evicted >= kept
    assert_books_agree(model)
