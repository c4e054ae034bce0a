"""Transformers' interface over running batches: what comes back, what comes late, who else uses the model, what is left."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestStatus

import hf_fastattn
from hf_fastattn.batching.engine import Engine
from hf_fastattn.batching.manager import FastBatchingManager
from tests.batching.served import NEW, Twins, prompts

ENDS = tuple(range(3, 128, 9))


def greedy(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, **options})


def assert_served(twins: Twins, count: int) -> Any:
    """So many requests ran on our engine, and nothing is left of them."""
    call = twins.report.last_call
    assert call.requests_batched == count and not call.not_looped and not call.fallbacks
    assert twins.report.pages_in_use == 0
    return call


def collect(manager: Any, count: int, seconds: float = 60) -> dict[str, list[Any]]:
    """The outputs until `count` requests are over."""
    found: dict[str, list[Any]] = {}
    until = time.monotonic() + seconds
    while sum(held[-1].is_finished() for held in found.values()) < count:
        assert time.monotonic() < until, f"only {list(found)} have come"
        result = manager.get_result(timeout=0.2)
        if result is not None:
            found.setdefault(result.request_id, []).append(result)
    return found


def test_generate_batch(device: str) -> None:
    twins, given = Twins("llama", device), prompts(8)
    outputs = twins.model.generate_batch(given, generation_config=greedy())
    assert list(outputs) == [f"req_{place}" for place in range(8)]
    for prompt, output in zip(given, outputs.values(), strict=True):
        assert output.generated_tokens == twins.alone(prompt) and output.prompt_ids == prompt
        assert output.status == RequestStatus.FINISHED and output.error is None
        assert output.created_time <= output.lifespan[0] <= output.lifespan[1]
    call = assert_served(twins, 8)
    assert call.batch_steps == NEW - 1
    assert f"8 requests in {NEW - 1} steps" in str(twins.report)


def test_its_options(device: str) -> None:
    twins, given = Twins("llama", device), prompts(4)
    config = greedy(eos_token_id=list(ENDS))
    config.num_return_sequences = 2
    outputs = twins.model.generate_batch(
        given, generation_config=config, max_new_tokens=9, record_timestamps=True, progress_bar=False, warmup=False
    )
    for place, prompt in enumerate(given):
        expected = twins.alone(prompt, 9, ENDS)
        assert outputs[f"req_{place}"].generated_tokens == expected
        assert len(outputs[f"req_{place}"].timestamps) == len(expected)
    assert_served(twins, 8)
    assert twins.model.generate_batch([]) == {}


def test_in_inference_mode(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twins, given = Twins("llama", device), prompts(4)
    plain, with_gradients = Engine.run, []
    monkeypatch.setattr(Engine, "run", lambda self: (with_gradients.append(torch.is_grad_enabled()), plain(self))[1])
    for inference in (True, False):
        with torch.inference_mode(inference):
            outputs = twins.model.generate_batch(given, generation_config=greedy())
        assert [one.generated_tokens for one in outputs.values()] == [twins.alone(prompt) for prompt in given]
        assert_served(twins, 4)
    assert with_gradients and not any(with_gradients)


def test_streams_limits_and_cancellation(device: str) -> None:
    twins, given = Twins("llama", device), prompts(5)
    with twins.model.continuous_batching_context_manager(generation_config=greedy()) as manager:
        assert isinstance(manager, FastBatchingManager)
        manager.add_request(given[0], request_id="streamed", streaming=True)
        manager.add_request(given[1], request_id="short", max_new_tokens=3)
        manager.add_request(given[2], request_id="endless", max_new_tokens=10**6)
        manager.add_request(given[3], request_id="ends", eos_token_id=list(ENDS))
        manager.add_request(given[4], request_id="unknown", temperature=0.5)
        found = collect(manager, 4)
        manager.cancel_request("endless")
        again = manager.add_request(given[4])
        found |= collect(manager, 1)
    assert [one.generated_tokens for one in found["streamed"]] == [twins.alone(given[0])[:n] for n in range(1, NEW + 1)]
    assert found["short"][-1].generated_tokens == twins.alone(given[1], 3)
    assert found["ends"][-1].generated_tokens == twins.alone(given[3], ends=ENDS)
    assert found["unknown"][-1].status == RequestStatus.FAILED and "temperature" in found["unknown"][-1].error
    assert found[again][-1].generated_tokens == twins.alone(given[4])
    assert "endless" not in found
    assert_served(twins, 4)


def test_handlers(device: str) -> None:
    """As `transformers serve` takes its tokens."""
    twins, given = Twins("llama", device), prompts(3)

    async def serve(manager: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for place, prompt in enumerate(given):
            name = f"http {place}"
            found[name] = []
            manager.register_result_handler(name, found[name].append)
            manager.add_request(prompt, request_id=name, streaming=place == 0)
        while not all(held and held[-1].is_finished() for held in found.values()):
            await asyncio.sleep(0.01)
        return found

    manager = twins.model.init_continuous_batching(generation_config=greedy())
    manager.start()
    try:
        found = asyncio.run(asyncio.wait_for(serve(manager), 60))
    finally:
        manager.stop(block=True)
    for place, prompt in enumerate(given):
        assert found[f"http {place}"][-1].generated_tokens == twins.alone(prompt)
    assert len(found["http 0"]) == NEW
    assert_served(twins, 3)


def test_a_kept_manager(device: str) -> None:
    twins, given = Twins("llama", device), prompts(4)
    for _ in range(2):
        outputs = twins.model.generate_batch(given, generation_config=greedy(), persistent_manager=True)
        assert [one.generated_tokens for one in outputs.values()][-4:] == [twins.alone(prompt) for prompt in given]
        assert_served(twins, 4)
    held = twins.model._cached_continuous_batching_manager
    assert twins.model.init_continuous_batching() is held
    hf_fastattn.unpatch(twins.model)
    assert not hasattr(twins.model, "_cached_continuous_batching_manager")
    assert type(twins.model.init_continuous_batching(greedy())) is ContinuousBatchingManager


def test_draws(device: str) -> None:
    twins = Twins("llama", device)
    config = greedy(do_sample=True, temperature=0.9, top_k=3, num_return_sequences=40)
    seeded = ContinuousBatchingConfig(seed=7)
    runs = []
    for batching in (seeded, seeded, ContinuousBatchingConfig(seed=8)):
        with twins.model.continuous_batching_context_manager(config, continuous_batching_config=batching) as manager:
            manager.add_request([5, 6, 7], request_id="drawn")
            found = collect(manager, 40)
        runs.append({name: held[-1].generated_tokens for name, held in found.items()})
        assert_served(twins, 40)
    assert len({tuple(tokens) for tokens in runs[0].values()}) > 30
    assert runs[0] == runs[1] != runs[2]
    logits = twins.stock(torch.tensor([[5, 6, 7]], device=twins.stock.device)).logits[0, -1]
    likeliest = set(logits.topk(3).indices.tolist())
    firsts = {tokens[0] for run in runs for tokens in run.values()}
    assert firsts <= likeliest and len(firsts) > 1


@pytest.mark.parametrize(
    ("options", "batching", "reason"),
    [
        ({}, {"return_logprobs": True, "scheduler_type": "prefill_first"}, "scheduler_type"),
        ({"suppress_tokens": [3]}, {}, "SuppressTokensLogitsProcessor"),
    ],
)
def test_what_is_not_ours_runs_as_ever(options: dict[str, Any], batching: dict[str, Any], reason: str, device: str) -> None:
    twins, given = Twins("llama", device), prompts(3)
    config, batching_config = greedy(**options), ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, **batching)
    outputs = twins.model.generate_batch(given, generation_config=config, continuous_batching_config=batching_config)
    assert all(len(one.generated_tokens) == NEW for one in outputs.values())
    if not options:
        assert [one.generated_tokens for one in outputs.values()] == [twins.alone(prompt) for prompt in given]
        assert all(len(one.logprobs) == NEW for one in outputs.values())
    assert any(reason in why for why in twins.report.last_call.not_looped)
    assert twins.report.last_call.requests_batched == 0


def test_models_that_are_not_patched_are_as_ever(device: str) -> None:
    twins = Twins("llama", device)
    config = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    manager = copy.deepcopy(twins.model).init_continuous_batching(greedy(), config)
    assert type(manager) is ContinuousBatchingManager
    assert type(twins.stock.init_continuous_batching(greedy(), config)) is ContinuousBatchingManager


def test_generate_beside(device: str) -> None:
    """generate() of another thread gets its turn between two steps, and both get their tokens."""
    twins, given = Twins("llama", device), prompts(12)
    beside: list[Any] = []
    expected = twins.alone(given[0])

    def generate() -> None:
        ids = torch.tensor([given[0]], device=twins.model.device)
        for _ in range(4):
            tokens = twins.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            beside.append(tokens[0, len(given[0]) :].tolist())

    with twins.model.continuous_batching_context_manager(generation_config=greedy()) as manager:
        thread = threading.Thread(target=generate)
        for prompt in given[:6]:
            manager.add_request(prompt, max_new_tokens=NEW)
        thread.start()
        for prompt in given[6:]:
            manager.add_request(prompt, max_new_tokens=NEW)
        found = collect(manager, 12)
        thread.join(60)
    assert not thread.is_alive()
    assert beside == [expected] * 4
    assert [found[f"req_{place}"][-1].generated_tokens for place in range(12)] == [twins.alone(one) for one in given]
    assert twins.report.pages_in_use == 0


def test_warm_up_while_it_runs(device: str) -> None:
    twins = Twins("llama", device)
    with twins.model.continuous_batching_context_manager(generation_config=greedy(), warmup=False) as manager:
        manager.add_request([5, 6, 7], request_id="first", max_new_tokens=200, streaming=True)
        assert manager.get_result(timeout=30) is not None
        manager.warmup()
        manager.add_request([8, 9], request_id="second")
        found = collect(manager, 2)
    assert found["first"][-1].generated_tokens == twins.alone([5, 6, 7], 200)
    assert found["second"][-1].generated_tokens == twins.alone([8, 9])
    assert_served(twins, 2)


def test_generate_need_not_wait_for_the_end(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However patient it is, and although there is always another step."""
    monkeypatch.setattr("hf_fastattn.runtime.PATIENCE", 60.0)
    twins = Twins("llama", device)
    ids = torch.tensor([[5, 6, 7]], device=twins.model.device)
    with twins.model.continuous_batching_context_manager(generation_config=greedy()) as manager:
        manager.add_request([8, 9], request_id="endless", max_new_tokens=10**6, streaming=True)
        assert manager.get_result(timeout=30) is not None
        begun = time.monotonic()
        tokens = twins.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert time.monotonic() - begun < 30
        assert not twins.report.last_call.fallbacks
        manager.cancel_request("endless")
    assert tokens[0, 3:].tolist() == twins.alone([5, 6, 7])
    assert twins.report.pages_in_use == 0


def test_an_error_fails_what_is_under_way_and_nothing_else(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    twins, given = Twins("llama", device), prompts(4)
    plain, rounds = Engine.run, []

    def broken(self: Engine) -> None:
        rounds.append(1)
        if len(rounds) == 12:
            raise RuntimeError("planted")
        plain(self)

    monkeypatch.setattr(Engine, "run", broken)
    with twins.model.continuous_batching_context_manager(generation_config=greedy(), warmup=False) as manager:
        manager.add_request(given[0], request_id="short", max_new_tokens=2)
        manager.add_request(given[1], request_id="long")
        found = collect(manager, 2)
    assert found["short"][-1].generated_tokens == twins.alone(given[0], 2)
    failed = found["long"][-1]
    assert failed.status == RequestStatus.FAILED and failed.error == "planted"
    assert failed.generated_tokens == twins.alone(given[1])[: len(failed.generated_tokens)]
    assert twins.report.pages_in_use == 0
    outputs = twins.model.generate_batch(given, generation_config=greedy())
    assert [one.generated_tokens for one in outputs.values()] == [twins.alone(prompt) for prompt in given]
    assert_served(twins, 4)


def test_a_hard_stop(device: str) -> None:
    twins = Twins("llama", device)
    manager = twins.model.init_continuous_batching(generation_config=greedy())
    manager.start()
    manager.add_request([5, 6, 7], request_id="endless", max_new_tokens=10**6, streaming=True)
    assert manager.get_result(timeout=30) is not None
    manager.stop(block=True, timeout=30, hard_stop=True)
    assert not manager.is_running()
    last = None
    while not manager.output_router.output_queue.empty():
        last = manager.output_router.output_queue.get()
    assert last.status == RequestStatus.FAILED and "stopped" in last.error
    assert twins.report.pages_in_use == 0


def test_unpatched_amid_requests(device: str) -> None:
    """What is under way fails with the reason; the model is as it was before the patch."""
    twins = Twins("llama", device)
    with twins.model.continuous_batching_context_manager(generation_config=greedy()) as manager:
        manager.add_request([5, 6, 7], request_id="endless", max_new_tokens=10**6, streaming=True)
        assert manager.get_result(timeout=30) is not None
        hf_fastattn.unpatch(twins.model)
        found = collect(manager, 1)
    assert "patched" in found["endless"][-1].error
    ids = torch.tensor([[5, 6, 7]], device=twins.model.device)
    tokens = twins.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert tokens == twins.alone([5, 6, 7])


@pytest.mark.skipif(not hasattr(ContinuousBatchingManager, "pause"), reason="this Transformers has no pause()")
def test_weights_change_in_a_pause(device: str) -> None:
    twins, given = Twins("llama", device), prompts(1, 4, 60)[0] * 2
    with twins.model.continuous_batching_context_manager(generation_config=greedy()) as manager:
        first = manager.add_request(given)
        collect(manager, 1)
        with manager.pause():
            for model in (twins.stock, twins.model):
                with torch.no_grad():
                    model.lm_head.weight.mul_(-1.0)
        second = manager.add_request(given)
        found = collect(manager, 1)
    assert first != second
    twins.changed()
    assert found[second][-1].generated_tokens == twins.alone(given)
    assert twins.report.last_call.tokens_reused == 0
