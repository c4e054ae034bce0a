"""What requests ask about the choice of their tokens: how likely they were, and parameters of a draw of their own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_fastattn.batching import device_steps, running_batch
from tests.batching.served import NEW, Driven, Twins, prompts
from tests.batching.test_manager import assert_served, collect, greedy

PAGE = 4
# What a manager asks for, and requests instead.
SHARED: dict[str, Any] = {"temperature": 1.5, "top_k": 60, "top_p": 0.95, "min_p": 0.001}
OWN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"top_k": 3},
    {"top_p": 0.5},
    {"temperature": 3.0, "top_k": 7, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 10**9, "top_p": 1.0},
]
DRAWN = GenerationConfig(do_sample=True, max_new_tokens=NEW, **SHARED)


def expected_logprobs(twins: Twins, prompt: list[int], tokens: list[int], asked: dict[str, Any] | None) -> list[float]:
    """Of tokens that follow a prompt, by the unpatched model and Transformers' warpers; of its softmax without `asked`."""
    ids = torch.tensor([prompt + tokens], device=twins.stock.device)
    with torch.no_grad():
        scores = twins.stock(ids).logits[0, len(prompt) - 1 : -1].float()
    if asked is not None:
        values = SHARED | asked
        kept = min(values["top_k"], scores.shape[-1])
        warpers = (
            TemperatureLogitsWarper(values["temperature"]), TopKLogitsWarper(kept), TopPLogitsWarper(values["top_p"]),
            MinPLogitsWarper(values["min_p"]),
        )  # fmt: skip
        scores = LogitsProcessorList(warpers)(ids, scores)
    return scores.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].tolist()


def assert_likely(twins: Twins, prompt: list[int], output: Any, asked: dict[str, Any] | None) -> None:
    expected = expected_logprobs(twins, prompt, output.generated_tokens, asked)
    assert all(map(math.isfinite, expected)), "a token was drawn that Transformers drops"
    np.testing.assert_allclose(output.logprobs, expected, rtol=1e-4, atol=1e-4)


def test_logprobs_are_those_of_transformers(device: str) -> None:
    twins, given = Twins("llama", device), prompts(5)
    config = ContinuousBatchingConfig(return_logprobs=True, num_blocks=8, max_batch_tokens=64)
    ours = twins.model.generate_batch(given, generation_config=greedy(), continuous_batching_config=config)
    assert_served(twins, 5)
    theirs = twins.stock.generate_batch(given, generation_config=greedy(), continuous_batching_config=config)
    for name, output in theirs.items():
        assert ours[name].generated_tokens == output.generated_tokens
        assert len(ours[name].logprobs) == NEW
        np.testing.assert_allclose(ours[name].logprobs, output.logprobs, rtol=1e-4, atol=1e-4)


def test_logprobs_under_page_pressure(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests start over, are streamed, and move; each token keeps what was said of it."""
    monkeypatch.setattr(running_batch, "AHEAD", 6)
    monkeypatch.setattr(device_steps, "WORTH_CAPTURING", 1)
    twins, given = Twins("llama", device, page_size=PAGE), prompts(8, 3, 20)
    driven = Driven(twins, 24 * PAGE, return_logprobs=True)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 5 if place % 3 == 1 else NEW, streaming=place % 2 == 0)
    driven.run()
    for place, prompt in enumerate(given):
        assert driven.tokens(str(place)) == twins.alone(prompt, 5 if place % 3 == 1 else NEW)
        for output in driven.outputs[str(place)]:
            assert len(output.logprobs) == len(output.generated_tokens)
        assert_likely(twins, prompt, driven.outputs[str(place)][-1], None)
    assert driven.release().requests_preempted > 0


@pytest.mark.parametrize("own", [True, False])
def test_draws_by_parameters_of_their_own(own: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request draws as it asks for, whatever slot it is in, and whoever was there before."""
    monkeypatch.setattr(running_batch, "AHEAD", 6)
    monkeypatch.setattr(device_steps, "WORTH_CAPTURING", 1)
    twins, given = Twins("llama", device, page_size=PAGE), prompts(12, 3, 20)
    driven = Driven(
        twins, 40 * PAGE, DRAWN, return_logprobs=True, per_request_processors=own, seed=3, max_requests_per_batch=5
    )
    asked = [OWN[place % len(OWN)] if own else {} for place in range(len(given))]
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 6 + 3 * (place % 7), logit_processor_kwargs=asked[place], num_children=place % 2)
        driven.run(1)
    driven.run()
    for place, prompt in enumerate(given):
        for name in (str(place), *[f"{place}__child#0"] * (place % 2)):
            assert len(driven.tokens(name)) == 6 + 3 * (place % 7)
            assert_likely(twins, prompt, driven.outputs[name][-1], asked[place])
    driven.release()


def test_parameters_move_with_their_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_steps, "WORTH_CAPTURING", 1)
    twins, given = Twins("llama", device), prompts(12, 7)
    driven = Driven(twins, None, DRAWN, return_logprobs=True, per_request_processors=True)
    asked = [OWN[(place // 4) + 2] if place % 4 == 0 else OWN[1] for place in range(len(given))]
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, 3 if place % 4 else 40, logit_processor_kwargs=asked[place])
    driven.run()
    for place, prompt in enumerate(given):
        assert_likely(twins, prompt, driven.outputs[str(place)][-1], asked[place])
    driven.release()


def test_a_manager_with_parameters_of_requests(device: str) -> None:
    """The likeliest tokens for whoever keeps one, as from Transformers' own manager."""
    twins, given = Twins("llama", device), prompts(4)
    config = ContinuousBatchingConfig(per_request_processors=True, num_blocks=8, max_batch_tokens=64)
    found: list[dict[str, list[Any]]] = []
    for model in (twins.model, twins.stock):
        with model.continuous_batching_context_manager(DRAWN, continuous_batching_config=config) as manager:
            manager.add_request(given[0], request_id="likeliest", top_k=1)
            manager.add_request(given[1], request_id="none", top_k=0)
            manager.add_request(given[2], request_id="tiny", top_p=0.0)
            manager.add_request(given[3], request_id="type", temperature=1)
            manager.add_request(given[3], request_id="unknown", warmth=1.0)
            found.append(collect(manager, 5))
            if model is twins.model:
                manager.add_request(given[0], request_id="cold", temperature=0.0)
                manager.add_request(given[0], request_id="after", temperature=0.5)
                found[0] |= collect(manager, 2)
                assert twins.report.last_call.requests_batched == 4
    ours, theirs = found
    for name, last in theirs.items():
        assert ours[name][-1].generated_tokens == last[-1].generated_tokens and ours[name][-1].error == last[-1].error
    assert [ours[name][-1].generated_tokens for name in ("likeliest", "none", "tiny")] == [
        twins.alone(prompt) for prompt in given[:3]
    ]
    assert "temperature is 0.0" in ours["cold"][-1].error
    assert len(ours["after"][-1].generated_tokens) == NEW
    assert twins.report.pages_in_use == 0
