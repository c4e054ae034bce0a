"""Log-likelihoods on shared pages against stock's own forwards, with every token that was computed counted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.eval.harness import scorer
from hf_fastattn.eval.harness.scorer import Continuation, PrefixScorer, why_not_scored
from hf_fastattn.pages.page_pool import CacheFullError
from tests.tools.models import VOCAB, pair

EXACT = {"worth": 1, "levels": 99}


def questions(seed: int = 0, shots: int = 60) -> list[Continuation]:
    """Questions after the same examples, each with choices of several tokens and of one, and a text by itself."""
    rng = random.Random(seed)

    def some(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    examples, asked = some(shots), []
    for number in range(5):
        context = tuple(examples + some(9 + 3 * number))
        asked += [Continuation(context, tuple(some(rng.randint(2, 9)))) for _ in range(4)]
        asked += [Continuation(context, (token,)) for token in some(4)]
    asked.append(Continuation((1,), tuple(some(45))))
    # Twice the same, and one that another goes on from.
    asked += [asked[0], Continuation(asked[0].context, asked[0].targets[:1])]
    return asked


@torch.no_grad()
def by_stock(model: Any, asked: list[Continuation]) -> list[tuple[float, bool]]:
    found = []
    for one in asked:
        logprobs = torch.log_softmax(model(torch.tensor([one.read])).logits[0], -1)[-len(one.targets) :]
        targets = torch.tensor(one.targets)
        found.append((float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())))
    return found


def distinct(asked: list[Continuation]) -> int:
    return len({one.read[:count] for one in asked for count in range(1, len(one.read) + 1)})


def check(model: Any, found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    for (ours, likeliest), (theirs, is_likeliest) in zip(found, expected, strict=True):
        assert abs(ours - theirs) < 1e-3 + 1e-4 * abs(theirs) and likeliest == is_likeliest
    call = hf_fastattn.report(model).last_call
    assert call is not None and call.forwards > 0 and not call.fallbacks
    assert hf_fastattn.report(model).pages_in_use == 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe", "granite", "ministral3", "olmo2"])
def test_scores_are_stocks_and_each_distinct_token_is_computed_once(name: str) -> None:
    stock, model = pair(name)
    asked = questions()
    counted = PrefixScorer(model, **EXACT)
    check(model, counted.score(asked), by_stock(stock, asked))
    counts = counted.counts
    assert counts.computed == counts.planned == counts.distinct == distinct(asked) < counts.asked / 5


def test_what_is_computed_by_default_is_little_more() -> None:
    stock, model = pair("llama")
    asked = questions(1)
    counted = PrefixScorer(model)
    check(model, counted.score(asked), by_stock(stock, asked))
    counts = counted.counts
    assert counts.computed == counts.planned <= 1.05 * counts.distinct
    # Examples, questions, choices, and the text.
    assert counts.forwards <= 5


def test_choices_of_one_token_take_the_forward_of_their_context() -> None:
    stock, model = pair("llama")
    asked = [one for one in questions(2) if len(one.targets) == 1]
    counted = PrefixScorer(model, **EXACT)
    check(model, counted.score(asked), by_stock(stock, asked))
    assert counted.counts.forwards == 2 and counted.counts.computed == distinct(asked)


@pytest.mark.parametrize("most", [1, 64, 200])
def test_little_at_a_time_gives_the_same(most: int) -> None:
    stock, model = pair("llama")
    asked = questions(3)
    counted = PrefixScorer(model, most_tokens=most, **EXACT)
    check(model, counted.score(asked), by_stock(stock, asked))
    assert counted.counts.computed == distinct(asked)


def test_log_probabilities_are_made_a_few_columns_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    asked = questions(4)
    monkeypatch.setattr(scorer, "SLICE", 3 * VOCAB)
    counted = PrefixScorer(model, torch.float64, **EXACT)
    check(model, counted.score(asked), by_stock(stock, asked))


def test_requests_are_counted_as_they_go() -> None:
    model = pair("llama")[1]
    seen: list[int] = []
    asked = questions()
    PrefixScorer(model, on_scored=seen.append).score(asked)
    assert sum(seen) == len(asked) and len(seen) > 1 and PrefixScorer(model).score([]) == []


def test_where_memory_ends_no_page_is_held() -> None:
    model = hf_fastattn.patch(hf_fastattn.unpatch(pair("llama")[1]), memory_limit=2**15)
    asked = questions()
    with pytest.raises(CacheFullError):
        PrefixScorer(model).score(asked)
    assert hf_fastattn.report(model).pages_in_use == 0


def test_an_exception_amid_a_level_leaves_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    asked = questions()
    append, calls = scorer.append, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return append(*args, **kwargs)

    monkeypatch.setattr(scorer, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        PrefixScorer(model, **EXACT).score(asked)
    assert hf_fastattn.report(model).pages_in_use == 0
    check(model, PrefixScorer(model, **EXACT).score(asked), by_stock(stock, asked))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mistral_window", "sliding window"), ("qwen3_next", "linear-attention")],
)
def test_models_that_are_scored_as_ever_are_named(name: str, reason: str) -> None:
    stock, model = pair(name)
    assert reason in str(why_not_scored(model))
    assert why_not_scored(stock) == "the model is not patched"


def test_who_watches_hidden_states_is_respected() -> None:
    model = pair("llama")[1]
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    assert "hooks" in str(why_not_scored(model))
    handle.remove()
    assert why_not_scored(model) is None
