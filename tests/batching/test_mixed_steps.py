"""Steps that take in pieces of prompts: requests get the tokens that they get alone, and nothing is computed apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from hf_fastattn.batching import engine as engine_module
from hf_fastattn.batching import engine_parts, running_batch
from tests.batching.served import NEW, Driven, Twins, prompts

FAMILIES = ("llama", "qwen2_window", "mistral_window", "qwen3_moe", "qwen2_vl", "exaone4")
PAGE = 4


@pytest.fixture(params=["steps", pytest.param("cuda", marks=pytest.mark.gpu)])
def mixing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where steps are recorded; every step takes in pieces of a few tokens, from the first one on."""
    from hf_fastattn.batching import mixed_steps

    if request.param == "steps":
        request.getfixturevalue("on_the_cpu")
    monkeypatch.setattr(mixed_steps, "UNIT", 32)
    monkeypatch.setattr(mixed_steps, "WORTH_RECORDING", 0)
    monkeypatch.setattr(engine_module, "PIECE", 8)
    monkeypatch.setattr(running_batch, "AHEAD", 6)
    # Else many prompts are computed before any row goes on.
    monkeypatch.setattr(engine_module, "BURST", 0)
    return "cuda" if request.param == "cuda" else "cpu"


def _beside_rows(driven: Driven, given: list[list[int]], later: list[list[int]], new: int) -> None:
    """Some requests come at once, others while the first ones decode."""
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, new)
    driven.run(3)
    for place, prompt in enumerate(later):
        driven.add(f"later {place}", prompt, 5)
        driven.run(2)
    driven.run()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_beside_rows(family: str, mixing: str) -> None:
    twins, given, later = Twins(family, mixing, page_size=PAGE), prompts(3, 13, 20), prompts(9, 5, 60)
    driven = Driven(twins)
    _beside_rows(driven, given, later, 80)
    for place, prompt in enumerate(given):
        assert driven.tokens(str(place)) == twins.alone(prompt, 80)
    for place, prompt in enumerate(later):
        assert driven.tokens(f"later {place}") == twins.alone(prompt, 5)
    counters = driven.release()
    assert counters.prompt_pieces_mixed >= len(later) and not counters.uncaptured and not counters.fallbacks
    # Apart were those that came before any row.
    assert counters.forwards <= sum(-(-len(prompt) // 8) for prompt in given)
    assert counters.prompt_tokens + counters.tokens_reused == sum(map(len, [*given, *later]))


def test_beside_many_rows_prompts_are_computed_apart(mixing: str) -> None:
    """Steps take in pieces once few rows go on."""
    twins, given, later = Twins("llama", mixing), prompts(18, 3, 12), prompts(12, 4, 6)
    driven = Driven(twins)
    _beside_rows(driven, given, later, 60)
    assert [driven.tokens(str(place)) for place in range(18)] == [twins.alone(prompt, 60) for prompt in given]
    assert [driven.tokens(f"later {place}") for place in range(12)] == [twins.alone(prompt, 5) for prompt in later]
    assert driven.release().prompt_pieces_mixed == 0


def test_fewer_slots_than_rows_of_a_step(mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with pieces has at least half a unit of rows, however few requests may run at once."""
    from hf_fastattn.batching import mixed_steps

    monkeypatch.setattr(mixed_steps, "UNIT", 128)
    twins, given = Twins("llama", mixing), prompts(6, 3, 20)
    driven = Driven(twins, max_requests_per_batch=2)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 3 + 9 * (place % 2))
    driven.run()
    for place, prompt in enumerate(given):
        assert driven.tokens(str(place)) == twins.alone(prompt, 3 + 9 * (place % 2))
    assert driven.release().prompt_pieces_mixed > 0


def test_page_pressure(mixing: str) -> None:
    """Who makes way for older ones starts over in such steps too."""
    twins, given = Twins("llama", mixing, page_size=PAGE), prompts(8, 3, 20)
    driven = Driven(twins, 24 * PAGE)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt)
    driven.run()
    assert [driven.tokens(str(place)) for place in range(8)] == [twins.alone(prompt) for prompt in given]
    counters = driven.release()
    assert counters.requests_preempted > 0 and counters.prompt_pieces_mixed > counters.requests_preempted


@pytest.mark.parametrize("seed", range(4))
def test_random_arrivals_and_page_pressure(seed: int, mixing: str) -> None:
    rng = np.random.default_rng(seed)
    twins, given = Twins(FAMILIES[seed % 3], mixing, page_size=PAGE), prompts(12, seed % 3, 40)
    needed = sum(len(prompt) + NEW for prompt in given)
    driven = Driven(twins, max(needed // 4, 18 * PAGE))
    cancelled, waiting = set(), list(enumerate(given))
    while waiting or not driven.engine.is_idle:
        for place, prompt in waiting[: rng.integers(0, 4)]:
            driven.add(str(place), prompt, NEW if place % 3 else 1)
            waiting.remove((place, prompt))
        if rng.random() < 0.1:
            name = str(rng.integers(0, len(given)))
            cancelled.add(name)
            driven.engine.cancel([name])
        driven.run(int(rng.integers(1, 6)))
    for place, prompt in enumerate(given):
        if str(place) in driven.outputs:
            assert driven.tokens(str(place)) == twins.alone(prompt, NEW if place % 3 else 1)
        else:
            assert str(place) in cancelled
    counters = driven.release()
    assert counters.prompt_pieces_mixed > 0


def test_logprobs_and_own_parameters(mixing: str) -> None:
    """Each request draws by its own parameters, its first token too: with top_k=1 there is one choice."""
    known = Driven(Twins("llama", mixing)).config.__dataclass_fields__
    options = {name: True for name in ("return_logprobs", "per_request_processors") if name in known}
    twins, given, later = Twins("llama", mixing), prompts(3, 13, 20), prompts(6, 5, 30)
    driven = Driven(twins, generation=GenerationConfig(do_sample=True, temperature=1.0, top_k=1), **options)
    _beside_rows(driven, given, later, 60)
    for place, prompt in enumerate(later):
        assert driven.tokens(f"later {place}") == twins.alone(prompt, 5)
        if "return_logprobs" in options:
            shown = driven.outputs[f"later {place}"][-1].logprobs
            ids = torch.tensor([[*prompt, *driven.tokens(f"later {place}")]], device=mixing)
            with torch.no_grad():
                likely = twins.stock(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).amax(-1)
            assert len(shown) == 5 and np.isfinite(shown).all()
            # Of one token that may be drawn the probability is 1.
            assert np.allclose(shown, 0.0, atol=1e-4) or np.allclose(shown, likely.cpu(), atol=1e-3)
    assert driven.release().prompt_pieces_mixed >= 6


def test_recorded_where_it_pays(mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pieces are computed apart, until there have been as many as make recording worth while."""
    from hf_fastattn.batching import mixed_steps

    monkeypatch.setattr(mixed_steps, "WORTH_RECORDING", 8)
    twins, given, later = Twins("llama", mixing), prompts(3, 13, 20), prompts(16, 5, 8)
    driven = Driven(twins)
    _beside_rows(driven, given, later, 80)
    for place, prompt in enumerate(later):
        assert driven.tokens(f"later {place}") == twins.alone(prompt, 5)
    counters = driven.release()
    assert 0 < counters.prompt_pieces_mixed < 16 and counters.appends_replayed + counters.appends_captured > 0
    # What is recorded serves the next manager from the first prompt on.
    monkeypatch.setattr(mixed_steps, "WORTH_RECORDING", 10_000)
    driven = Driven(twins)
    _beside_rows(driven, given, later[:4], 80)
    assert driven.release().prompt_pieces_mixed >= 4


def _group(twins: Twins, given: list[list[int]], limits: list[int], **options: Any) -> Driven:
    """Requests that come together, to an engine that was told how many there are."""
    driven = Driven(twins, hints=WorkloadHints(64, 100, len(given)), max_batch_tokens=16)
    for place, (prompt, new) in enumerate(zip(given, limits, strict=True)):
        driven.add(str(place), prompt, new, **options)
    driven.run()
    for place, (prompt, new) in enumerate(zip(given, limits, strict=True)):
        assert driven.tokens(str(place)) == twins.alone(prompt, new)
    return driven


def test_who_gets_most_tokens_begins(mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are computed beside rows where no request ends later for it than the last one."""
    monkeypatch.setattr(engine_module, "BURST", 4)
    twins, given = Twins("llama", mixing, page_size=PAGE), prompts(5, 13, 20)
    limits = [3, 2, 40, 5, 90]
    driven = _group(twins, given, limits)
    counters = driven.release()
    # As many steps as the longest request has tokens after its first one: it has waited for nobody.
    assert counters.prompt_pieces_mixed >= 3 and counters.batch_steps == max(limits) - 1


@pytest.mark.parametrize("case", ["equal limits", "streamed"])
def test_nobody_waits_for_nothing(case: str, mixing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where waiting would cost time, or somebody looks on, all prompts are computed first."""
    monkeypatch.setattr(engine_module, "BURST", 4)
    twins, given = Twins("llama", mixing, page_size=PAGE), prompts(5, 13, 20)
    streamed = case == "streamed"
    driven = _group(twins, given, [3, 90, 2, 40, 5] if streamed else [24] * 5, streaming=streamed)
    assert driven.release().prompt_pieces_mixed == 0


@pytest.mark.parametrize(("requests", "waits"), [(16, True), (17, False), (None, False)])
def test_many_requests_do_not_wait(requests: int | None, waits: bool, mixing: str) -> None:
    """Beside many rows pieces cost as much as apart, and who gets most tokens need not begin."""
    hints = None if requests is None else WorkloadHints(64, 100, requests)
    for options, expected in (({}, waits), ({"mixed_steps": False}, False)):
        driven = Driven(Twins("llama", mixing, **options), hints=hints)
        assert driven.engine._patient == expected
        driven.release()


def test_warm_up_records_them(mixing: str) -> None:
    """Those of both sizes, but where all requests are there before any row decodes."""
    captured = []
    for hints in (WorkloadHints(64, 100, engine_parts.LIKELY_ROWS), None):
        twins = Twins("llama", mixing)
        Driven(twins).parts.warm_up(hints)
        captured.append(twins.report.last_call.graphs_captured)
    assert captured[1] == captured[0] + 2


def test_without_them_prompts_are_computed_apart(mixing: str) -> None:
    twins, given, later = Twins("llama", mixing, mixed_steps=False), prompts(3, 13, 20), prompts(5, 5, 30)
    driven = Driven(twins)
    _beside_rows(driven, given, later, 60)
    assert [driven.tokens(f"later {place}") for place in range(5)] == [twins.alone(prompt, 5) for prompt in later]
    counters = driven.release()
    assert counters.prompt_pieces_mixed == 0 and counters.appends_replayed > 0
