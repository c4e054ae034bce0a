"""Caches passed by hand, returned, copied and used again."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

import hf_fastattn
from hf_fastattn.runtime import Runtime
from hf_fastattn.transformers_version import CACHE
from tests.generation.calls import SAMPLING, assert_same_tokens, run
from tests.tools.models import CORE, OLD, assert_fast, padded_batch, pair, single, tiny


@pytest.mark.parametrize("family", CORE)
def test_users_subclass_of_a_dynamic_cache_falls_back(family: str) -> None:
    class Theirs(DynamicCache):
        """May do anything."""

    stock, model = pair(family)
    theirs, ours = Theirs(config=stock.config), Theirs(config=model.config)
    expected = run(stock, padded_batch(), 24, **{CACHE: theirs})
    tokens = run(model, padded_batch(), 24, **{CACHE: ours})
    assert torch.equal(tokens, expected)
    assert ours.get_seq_length() == theirs.get_seq_length() == 60
    call = hf_fastattn.report(model).last_call
    assert call.fallbacks and all("Theirs" in reason for reason in call.fallbacks)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, **SAMPLING}])
@pytest.mark.parametrize("by", ["keyword", "configuration", "model"])
def test_no_cache_runs_stock(options: dict[str, Any], by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model were not patched: nothing of it is looked at."""
    stock, model = pair("llama")
    monkeypatch.setattr("hf_fastattn.generation.hooks.look_ahead", None)
    monkeypatch.setattr(Runtime, "new_cache", None)
    monkeypatch.setattr("hf_fastattn.generation.model_class.look_at_once", None)
    tokens = []
    for each in (stock, model):
        torch.manual_seed(0)
        configuration = copy.deepcopy(each.generation_config)
        configuration.use_cache = by == "keyword"
        if by == "model":
            each.generation_config = configuration
        given = {"generation_config": configuration} if by == "configuration" else {}
        given |= {"use_cache": False} if by == "keyword" else {}
        tokens.append(run(each, padded_batch(), 12, **options, **given))
    assert torch.equal(*tokens)
    call = hf_fastattn.report(model).last_call
    assert call.fallbacks == {"cache_implementation=None, use_cache=False": 1} and call.forwards == 0
    monkeypatch.undo()
    assert_same_tokens(stock, model, padded_batch(), 12, use_cache=True)
    assert_fast(model)


def test_a_configuration_by_position_counts() -> None:
    """Not the model's own, which asks for no cache."""
    stock, model = pair("llama")
    configuration = copy.deepcopy(model.generation_config)
    configuration.use_cache, configuration.max_new_tokens, configuration.do_sample = True, 12, False
    model.generation_config.use_cache = False
    batch = padded_batch()
    tokens = [
        each.generate(batch["input_ids"], configuration, attention_mask=batch["attention_mask"]) for each in (stock, model)
    ]
    assert torch.equal(*tokens)
    assert_fast(model)


def test_a_call_without_a_cache_that_fails_leaves_nothing() -> None:
    stock, model = pair("llama")

    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert model._fastattn.runtime.is_aside
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, single(), 4, use_cache=False, logits_processor=LogitsProcessorList([fails]))
    assert not model._fastattn.runtime.is_aside
    assert_same_tokens(stock, model, padded_batch(), 12)
    assert_fast(model)


def test_a_cache_beside_use_cache_false_is_taken_as_by_stock() -> None:
    """Nobody's call without a cache: the one that is given is read."""
    stock, model = pair("llama")
    caches = [DynamicCache(config=each.config) for each in (stock, model)]
    first = [run(each, single(), 4, **{CACHE: cache}) for each, cache in zip((stock, model), caches, strict=True)]
    assert torch.equal(*first)
    again = [
        run(each, {"input_ids": first[0]}, 4, use_cache=False, **{CACHE: cache})
        for each, cache in zip((stock, model), caches, strict=True)
    ]
    assert torch.equal(*again)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def chat(model: Any, cache: Any, rows: int, **kwargs: Any) -> list[torch.Tensor]:
    """Three turns over one cache; from the second turn on rows are padded in the middle."""
    batch = padded_batch(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    turns = []
    for turn in range(3):
        tokens = run(
            model,
            {"input_ids": ids, "attention_mask": mask},
            12,
            **{CACHE: cache},
            **kwargs,
        )
        turns.append(tokens)
        message = padded_batch(rows, 11, seed=turn + 2)
        ids = torch.cat([tokens, message["input_ids"]], 1)
        answered = torch.ones(rows, tokens.shape[1] - mask.shape[1], dtype=mask.dtype)
        mask = torch.cat([mask, answered, message["attention_mask"]], 1)
    return turns


@pytest.mark.parametrize("options", [{}, SAMPLING, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize(("family", "rows"), [*((family, 3) for family in CORE), ("qwen2_window", 1)])
def test_chat_over_a_paged_cache(family: str, rows: int, options: dict[str, Any]) -> None:
    stock, model = pair(family)
    if "prefill_chunk_size" in options and OLD:
        pytest.skip("stock feeds the whole chat again in this version")
    cache = hf_fastattn.PagedCache(model.config)
    expected = chat(stock, DynamicCache(config=stock.config), rows, **options)
    turns = chat(model, cache, rows, **options)
    for ours, theirs in zip(turns, expected, strict=True):
        assert torch.equal(ours, theirs)
    if family == "qwen2_window" and rows > 1:
        # A later turn's padding lies in the middle; stock's windows count it, ours would not.
        fallbacks = hf_fastattn.report(model).last_call.fallbacks
        assert fallbacks and all("holes" in reason for reason in fallbacks)
    else:
        assert_fast(model, held=None)
    assert cache.get_seq_length() == turns[-1].shape[1] - 1
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(chat(model, cache, rows, **options)[0], expected[0])


def test_a_later_turn_computes_only_new_tokens() -> None:
    _, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config)
    chat(model, cache, 1)
    # The last token of the answer was never fed to the model, so it comes with the new message.
    assert_fast(model, 1 + 11, held=None)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("copies", [1, 3])
def test_returned_cache_can_be_used_again(family: str, copies: int) -> None:
    stock, model = pair(family)
    options: dict[str, Any] = {"return_dict_in_generate": True, "num_return_sequences": copies}
    if copies > 1:
        options |= SAMPLING
    results = []
    for side in (stock, model):
        first = run(side, padded_batch(2), 12, **options)
        mask = padded_batch(2)["attention_mask"].repeat_interleave(copies, 0)
        ids = torch.cat([first.sequences, first.sequences[:, -5:]], 1)
        mask = torch.cat([mask, torch.ones(2 * copies, 17, dtype=mask.dtype)], 1)
        again = {"input_ids": ids, "attention_mask": mask}
        results.append(run(side, again, 12, **{CACHE: first[CACHE]}))
        cache = first[CACHE]
    assert torch.equal(results[1], results[0])
    assert isinstance(cache, hf_fastattn.PagedCache)
    assert cache.get_seq_length() == results[1].shape[1] - 1
    assert_fast(model, held=None)
    assert hf_fastattn.report(model).pages_in_use > 0
    del cache, first
    gc.collect()
    assert hf_fastattn.report(model).pages_in_use == 0


def test_two_returned_caches_live_side_by_side() -> None:
    stock, model = pair("llama")
    ids = [single(30, seed)["input_ids"] for seed in (1, 2)]
    results: dict[str, list[torch.Tensor]] = {}
    for name, side in (("stock", stock), ("ours", model)):
        caches = []
        for prompt in ids:
            out = run(side, {"input_ids": prompt}, 8, return_dict_in_generate=True)
            caches.append((out.sequences, out[CACHE]))
        results[name] = [
            run(
                side,
                {"input_ids": torch.cat([text, prompt], 1)},
                12,
                **{CACHE: cache},
            )
            for (text, cache), prompt in zip(caches, ids, strict=True)
        ]
    for ours, theirs in zip(results["ours"], results["stock"], strict=True):
        assert torch.equal(ours, theirs)
    assert_fast(model, held=None)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [1, 3])
def test_copies_of_a_filled_cache(family: str, rows: int) -> None:
    """A system prompt computed once, its cache copied for each question, as Transformers' guide does it."""
    stock, model = pair(family)
    answers: list[list[torch.Tensor]] = []
    for side, cache in (
        (stock, DynamicCache(config=stock.config)),
        (model, hf_fastattn.PagedCache(model.config)),
    ):
        system = padded_batch(rows)
        with torch.no_grad():
            side(**system, **{CACHE: cache})
        answers.append([])
        for seed in (3, 4):
            question = padded_batch(1, 11, seed)["input_ids"].expand(rows, -1)
            batch = {
                "input_ids": torch.cat([system["input_ids"], question], 1),
                "attention_mask": torch.cat([system["attention_mask"], torch.ones_like(question)], 1),
            }
            answers[-1].append(run(side, batch, 20, **{CACHE: copy.deepcopy(cache)}))
        assert cache.get_seq_length() == 37
    for ours, theirs in zip(answers[1], answers[0], strict=True):
        assert torch.equal(ours, theirs)
    call = assert_fast(model, 11 * rows, held=None)
    assert call.forwards == 20


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_unpatched_model_with_a_paged_cache(family: str, options: dict[str, Any]) -> None:
    stock = tiny(family)
    batch = single() if "prompt_lookup_num_tokens" in options else padded_batch()
    cache = hf_fastattn.PagedCache(stock.config)
    tokens = run(stock, batch, 24, **{CACHE: cache}, **options)
    if "prompt_lookup_num_tokens" in options:
        options = {}
    assert torch.equal(tokens, run(stock, batch, 24, **options))
    assert cache.get_seq_length() == tokens.shape[1] - 1 and cache.groups.pages_in_use == 0
