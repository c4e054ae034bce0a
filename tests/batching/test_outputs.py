"""Who asked for outputs may have gone, raise, wait in another thread, or be inside a call: others get theirs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, LogitsProcessor

from hf_fastattn.batching import manager as manager_module
from tests.batching.served import NEW, Twins, prompts
from tests.batching.test_manager import assert_served, collect, greedy

ENDLESS = 10**6


@contextmanager
def running(twins: Twins, **options: Any) -> Iterator[Any]:
    """A manager, which comes to an end by itself: no request is left that goes on for ever."""
    manager = twins.model.init_continuous_batching(generation_config=greedy(), **options)
    manager.start()
    try:
        yield manager
        manager.stop(block=True, timeout=60)
        assert not manager.is_running(), "a request that nobody wants goes on"
    finally:
        manager.stop(block=True, hard_stop=True)
    assert not manager.output_router.result_handlers and twins.report.pages_in_use == 0


def test_an_event_loop_that_was_closed() -> None:
    """Its request is cancelled, whose last token nobody would ever take; others go on."""
    twins, given = Twins("llama", "cpu"), prompts(2)

    async def come_and_go(manager: Any) -> None:
        came = asyncio.Event()
        manager.register_result_handler("gone", lambda output: came.set())
        manager.add_request(given[0], request_id="gone", max_new_tokens=ENDLESS, streaming=True)
        await came.wait()

    with running(twins) as manager:
        asyncio.run(come_and_go(manager))
        manager.add_request(given[1], request_id="stays")
        found = collect(manager, 1)
    assert found["stays"][-1].generated_tokens == twins.alone(given[1])
    assert_served(twins, 1)


def test_a_handler_that_raises() -> None:
    """Its loop hears of each error; outputs that come beside it are not lost, and no handler is left."""
    twins, given = Twins("llama", "cpu"), prompts(2)
    raised: list[Any] = []
    found: list[Any] = []

    def broken(output: Any) -> None:
        raise KeyError(len(output.generated_tokens))

    async def serve(manager: Any) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context["exception"]))
        for name, handler, prompt in (("broken", broken, given[0]), ("fine", found.append, given[1])):
            manager.register_result_handler(name, handler)
            manager.add_request(prompt, request_id=name, streaming=True)
        while len(raised) < NEW or not found or not found[-1].is_finished():
            await asyncio.sleep(0.01)

    with running(twins) as manager:
        asyncio.run(asyncio.wait_for(serve(manager), 60))
    assert [one.args[0] for one in raised] == list(range(1, NEW + 1))
    assert [one.generated_tokens for one in found] == [twins.alone(given[1])[:count] for count in range(1, NEW + 1)]
    assert_served(twins, 2)


def test_handlers_in_two_threads() -> None:
    """Each runs in the thread of its own event loop."""
    twins, given = Twins("llama", "cpu"), prompts(2)
    found: dict[int, list[Any]] = {0: [], 1: []}
    strangers: list[int] = []

    async def serve(manager: Any, place: int) -> None:
        mine = threading.get_ident()

        def handler(output: Any) -> None:
            found[place].append(output.generated_tokens)
            strangers.extend([place] if threading.get_ident() != mine else [])

        manager.register_result_handler(str(place), handler)
        manager.add_request(given[place], request_id=str(place), streaming=True)
        while not found[place] or len(found[place][-1]) < NEW:
            await asyncio.sleep(0.01)

    with running(twins) as manager:
        threads = [threading.Thread(target=lambda one=one: asyncio.run(serve(manager, one))) for one in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not strangers
    for place in range(2):
        assert found[place] == [twins.alone(given[place])[:count] for count in range(1, NEW + 1)]


def test_cancelled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes and is cancelled while the thread looks for new ones does not go on for ever."""
    twins, plain, late = Twins("llama", "cpu"), manager_module.drain_queue, [True]

    def racing(queue: Any) -> Any:
        found = plain(queue)
        if late and found and queue is manager.input_queue:
            late.clear()
            manager.add_request([5, 6, 7], request_id="late", max_new_tokens=ENDLESS)
            manager.cancel_request("late")
        return found

    monkeypatch.setattr(manager_module, "drain_queue", racing)
    with running(twins) as manager:
        manager.add_request([8, 9], request_id="first")
        found = collect(manager, 1)
        until = time.monotonic() + 60
        while not (manager.cancel_queue.empty() and manager.input_queue.empty()):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not late and list(found) == ["first"]


def test_inside_generate() -> None:
    """What a processor of generate() asks a batch of requests for runs as ever, instead of waiting for itself."""
    twins, given = Twins("llama", "cpu"), prompts(2)
    answers: list[Any] = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            if not answers:
                batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
                answers.append(twins.model.generate_batch(given, greedy(), batching))
            return scores

    ids = torch.tensor([[5, 6, 7]])
    tokens = twins.model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, logits_processor=[Asks()])
    assert tokens[0, 3:].tolist() == twins.alone([5, 6, 7])
    assert [one.generated_tokens for one in answers[0].values()] == [twins.alone(prompt) for prompt in given]
    assert any("inside a generate()" in reason for reason in twins.report.last_call.not_looped)
    assert twins.report.pages_in_use == 0


def test_streams_with_logprobs_after_starting_over() -> None:
    """What is shown token by token is what the last output shows, also of requests that had to make way."""
    from tests.batching.served import Driven

    twins, given = Twins("llama", "cpu", page_size=4), prompts(8, 3, 20)
    known = ContinuousBatchingConfig.__dataclass_fields__
    options = {"return_logprobs": True} if "return_logprobs" in known else {}
    driven = Driven(twins, 24 * 4, **options)
    for place, prompt in enumerate(given):
        driven.add(str(place), prompt, streaming=True, record_timestamps=True)
    driven.run()
    for place, prompt in enumerate(given):
        outputs = driven.outputs[str(place)]
        assert [one.generated_tokens for one in outputs] == [twins.alone(prompt)[:count] for count in range(1, NEW + 1)]
        assert [one.logprobs for one in outputs] == [
            outputs[-1].logprobs[:count] for count in range(1, NEW + 1)
        ] or not options
        assert [len(one.timestamps) for one in outputs] == list(range(1, NEW + 1))
    assert driven.release().requests_preempted > 0
