"""`FastLM` beside lm-evaluation-harness's own `HFLM`: equal answers, and how they came about."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED

model_module = pytest.importorskip("hf_fastattn.eval.harness.model", reason="lm-eval is not installed")
HFLM, FastLM = model_module.HFLM, model_module.FastLM

FEW = "Remember oak river stone.\n" * 12
TEXTS = ["def add(a, b):\n", "import os\nimport", "She had two apples, and", "for line in open(path):\n", "And the LORD"]


def request(*arguments: Any) -> Any:
    """What the models read of an instance."""
    return SimpleNamespace(args=arguments, task_name="")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture
def both(tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    models = [AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32) for _ in range(2)]
    yield (
        HFLM(pretrained=models[0], tokenizer=tokenizer, batch_size=4),
        FastLM(pretrained=models[1], tokenizer=tokenizer, batch_size=4),
    )


def alike(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    for (value, likeliest), (expected, is_likeliest) in zip(ours, theirs, strict=True):
        assert abs(value - expected) < 1e-3 and likeliest == is_likeliest


def test_log_likelihoods(both: tuple[Any, Any]) -> None:
    stock, lm = both
    asked = [(FEW + text, choice) for text in TEXTS for choice in (" a river and a stone", " b", " c", "\n", "")[:4]]
    asked += [("", "It was a truth"), (TEXTS[0] + "  ", "return a"), asked[0]]
    noted: list[Any] = []
    lm.cache_hook = SimpleNamespace(add_partial=lambda *given: noted.append(given))
    found = lm.loglikelihood([request(*one) for one in asked], disable_tqdm=True)
    alike(found, stock.loglikelihood([request(*one) for one in asked], disable_tqdm=True))
    assert [(name, texts) for name, texts, _ in noted] == [("loglikelihood", one) for one in asked]
    assert [answer for _, _, answer in noted] == found
    assert lm.counts.computed == lm.counts.planned <= 1.05 * lm.counts.distinct < lm.counts.asked / 5
    call = hf_fastattn.report(lm.model).last_call
    assert not lm.stock_ways and call.forwards > 0 and not call.fallbacks and hf_fastattn.report(lm.model).pages_in_use == 0


def test_rolling_log_likelihoods_and_truncated_contexts(both: tuple[Any, Any]) -> None:
    stock, lm = both
    for one in both:
        one._max_length = 40
    texts = [request(FEW), request(TEXTS[0] * 9), request("And the LORD spake")]
    ours, theirs = (one.loglikelihood_rolling(texts, disable_tqdm=True) for one in (lm, stock))
    assert all(abs(a - b) < 1e-3 for a, b in zip(ours, theirs, strict=True))
    long = [request(FEW, " oak river stone"), request(FEW, "\nRecall")]
    alike(lm.loglikelihood(long, disable_tqdm=True), stock.loglikelihood(long, disable_tqdm=True))
    assert not lm.stock_ways and lm.counts.computed > 0


def test_texts_come_from_one_running_batch(both: tuple[Any, Any]) -> None:
    stock, lm = both

    def asked() -> list[Any]:
        # The harness writes to the options.
        short = [request(text, {"until": ["\n", ". "], "max_gen_toks": 64}) for text in TEXTS]
        return [*short, *(request(text, {"until": [], "max_gen_toks": 5, "do_sample": False}) for text in TEXTS[:2])]

    answers = lm.generate_until(asked(), disable_tqdm=True)
    assert answers == stock.generate_until(asked(), disable_tqdm=True) and len(set(answers)) > 4
    # Of those with stop strings some leave the batch at one, and are not served to their end.
    assert lm.generate_until(asked()[:5], disable_tqdm=True) == answers[:5]
    call = hf_fastattn.report(lm.model).last_call
    assert (
        not lm.stock_ways
        and call.batch_steps > 0
        and call.requests_batched < 5
        and not call.not_looped
        and lm.batch_size == 4
    )
    assert hf_fastattn.report(lm.model).pages_in_use == 0


def test_options_that_are_not_known_run_the_harness_s_own_way(both: tuple[Any, Any]) -> None:
    stock, lm = both

    def asked() -> list[Any]:
        known = request(TEXTS[1], {"until": ["\n"], "max_gen_toks": 6})
        return [request(TEXTS[0], {"until": ["\n"], "max_gen_toks": 6, "num_beams": 2}), known]

    assert lm.generate_until(asked(), disable_tqdm=True) == stock.generate_until(asked(), disable_tqdm=True)
    assert dict(lm.stock_ways) == {"a running batch does not know num_beams": 1}


def test_drawn_texts_are_batched_too(both: tuple[Any, Any]) -> None:
    lm = both[1]
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    torch.manual_seed(0)
    answers = lm.generate_until([request(TEXTS[2], dict(options)) for _ in range(6)], disable_tqdm=True)
    assert len(set(answers)) > 1 and not lm.stock_ways and hf_fastattn.report(lm.model).last_call.batch_steps > 0


def test_a_model_that_cannot_be_patched_runs_the_harness_s_own_way(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8192, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    lm = FastLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    asked = [request("And the", " LORD"), request("import", " os")]
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood(asked, disable_tqdm=True)
    assert lm.loglikelihood(asked, disable_tqdm=True) == expected
    assert lm.generate_until([request("import", {"until": ["\n"], "max_gen_toks": 3})], disable_tqdm=True)
    assert not lm.is_patched and sum(lm.stock_ways.values()) == 3
    assert all("cannot be patched" in reason for reason in lm.stock_ways)


def test_without_memory_for_pages_the_harness_s_own_way_is_taken(both: tuple[Any, Any], tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    lm = FastLM(pretrained=model, tokenizer=tokenizer, batch_size=2, patch_options={"memory_limit": 2**17})
    asked = [request(FEW + text, " river") for text in TEXTS]
    alike(lm.loglikelihood(asked, disable_tqdm=True), both[0].loglikelihood(asked, disable_tqdm=True))
    assert dict(lm.stock_ways) == {"memory does not suffice for the longest request on pages": len(asked)}


def test_prefixes_that_fit_a_few_at_a_time_are_scored_all_the_same(both: tuple[Any, Any], tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    # Of 7 layers with 2 heads of 32: 3,584 bytes a token, about 300 tokens.
    lm = FastLM(pretrained=model, tokenizer=tokenizer, batch_size=2, patch_options={"memory_limit": 2**20, "page_size": 16})
    asked = [request(text * 12, " river") for text in TEXTS]
    alike(lm.loglikelihood(asked, disable_tqdm=True), both[0].loglikelihood(asked, disable_tqdm=True))
    assert not lm.stock_ways and hf_fastattn.report(lm.model).pages_in_use == 0
