"""Several threads with one model: nobody fails or waits for ever where the unpatched model works."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

import hf_fastattn
from hf_fastattn.generation import columns_at_once
from hf_fastattn.pages import reach
from hf_fastattn.pages.page_storage import PageStorage
from hf_fastattn.runtime import BUSY
from hf_fastattn.transformers_version import CACHE
from tests.bad_input.healthy import assert_healthy, sample
from tests.bad_input.interrupting import assert_books_agree
from tests.tools.models import VOCAB, letters, padded_batch, pair, single


class Meanwhile(LogitsProcessor):
    """Waits, at every step, for something in another thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.results = work, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: self.results.append(self.work()), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "the other thread waits for this one"
        return scores


def greedy(model: Any, **more: Any) -> torch.Tensor:
    return sample(model, padded_batch(), do_sample=False, **more)


def test_a_second_thread_takes_transformers_own_path() -> None:
    stock, model = pair("llama")
    other = Meanwhile(lambda: greedy(model, num_beams=2))
    start = time.perf_counter()
    tokens = greedy(model, logits_processor=LogitsProcessorList([other]))
    call = hf_fastattn.report(model).last_call
    assert torch.equal(tokens, greedy(stock))
    assert len(other.results) == 12
    assert all(torch.equal(result, greedy(stock, num_beams=2)) for result in other.results)
    # The one counter is of the call that held the model, which the others have not reset.
    assert call.fallbacks == {BUSY: 12} and call.forwards == 12
    # Only the first of them has waited for that call.
    assert time.perf_counter() - start < 20
    assert_books_agree(model)
    assert_healthy(stock, model)


@pytest.mark.parametrize("where", ["the call's thread", "another thread", "a thread aside"])
def test_unpatch_amid_a_call_says_so(where: str) -> None:
    stock, model = pair("llama")

    def unpatch() -> str:
        with pytest.raises(RuntimeError, match="under way") as caught:
            hf_fastattn.unpatch(model)
        return str(caught.value)

    class Unpatches(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            unpatch()
            return scores

    own = Unpatches()
    other = Meanwhile(unpatch if where == "another thread" else lambda: greedy(model, logits_processor=[own]))
    tokens = greedy(model, logits_processor=LogitsProcessorList([own if where == "the call's thread" else other]))
    assert torch.equal(tokens, greedy(stock)) and hf_fastattn.report(model).last_call.forwards == 12
    assert where == "the call's thread" or len(other.results) == 12
    assert_books_agree(model)
    hf_fastattn.unpatch(model)
    assert torch.equal(greedy(model), tokens) and not hf_fastattn.report(model).patched


def test_many_threads() -> None:
    stock, model = pair("qwen2_window")
    prompts = [single(9 + number, seed=number) for number in range(8)]
    expected = [sample(stock, prompt, do_sample=False) for prompt in prompts]

    def ask(number: int) -> bool:
        return all(torch.equal(sample(model, prompts[number], do_sample=False), expected[number]) for _ in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert_books_agree(model)
    assert_healthy(stock, model)


def test_asyncio_and_streams() -> None:
    stock, model = pair("llama")

    async def ask() -> list[torch.Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(greedy, model) for _ in range(3)))

    assert all(torch.equal(tokens, greedy(stock)) for tokens in asyncio.run(ask()))
    # A stream that nobody reads on, and a second question meanwhile.
    threads, text = [], ""
    for _ in range(2):
        streamer = TextIteratorStreamer(letters(), skip_prompt=True, timeout=20)
        options = {"do_sample": False, "streamer": streamer}
        threads.append(threading.Thread(target=sample, args=(model, single(), 40), kwargs=options))
        threads[-1].start()
        text = next(streamer)
    text += "".join(streamer)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert text == letters().decode(sample(stock, single(), 40, do_sample=False)[0, 37:])
    assert_books_agree(model)


def test_a_dead_thread_or_an_ended_call_holds_nothing() -> None:
    stock, model = pair("llama")
    # What a call would leave that was interrupted before it could clean up.
    model._fastattn.runtime._end = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        greedy(model)
    del model._fastattn.runtime._end
    assert len(model._fastattn.runtime._calls) == 1
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(greedy, model).result(20), greedy(stock))
    assert hf_fastattn.report(model).last_call.fallbacks == {}
    assert_books_agree(model)
    assert_healthy(stock, model)


@pytest.mark.parametrize("change", ["forward", "copy", "reset", "crop", "reorder"])
def test_a_cache_of_the_models_pages_in_another_thread(change: str) -> None:
    """It gets pages of its own while a call is under way."""
    stock, model = pair("llama")
    _change_meanwhile(stock, model, change)
    assert_books_agree(model)


def _change_meanwhile(stock: Any, model: Any, change: str) -> None:
    first = greedy(model, return_dict_in_generate=True)
    cache, shared = first[CACHE], model._fastattn.runtime.groups
    twin, ids = copy.deepcopy(cache), torch.randint(1, VOCAB, (3, 1))
    mask = torch.cat((padded_batch()["attention_mask"], torch.ones(3, 12, dtype=torch.long)), 1)

    def forward(held: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, attention_mask=mask, **{CACHE: held}).logits

    expected = forward(copy.deepcopy(twin))

    def work() -> Any:
        if change == "forward":
            held = cache if cache.get_seq_length() == twin.get_seq_length() else copy.deepcopy(twin)
            return forward(held)
        held = copy.deepcopy(twin)
        assert held.groups is not shared
        if change == "copy":
            return forward(held)
        assert shared.pages_in_use > 0
        {"reset": held.reset, "crop": lambda: held.crop(-1), "reorder": lambda: held.reorder_cache(torch.arange(3))}[
            change
        ]()
        return forward(copy.deepcopy(twin))

    other = Meanwhile(work)
    tokens = greedy(model, logits_processor=LogitsProcessorList([other]))
    assert torch.equal(tokens, greedy(stock))
    assert len(other.results) == 12
    for logits in other.results:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (cache.groups is shared) == (change != "forward")


@pytest.mark.parametrize("in_steps", [False, True], ids=["at once", "in small steps"])
def test_out_of_memory_leaves_pages_and_tables_as_they_were(in_steps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("qwen2_window", {"page_size": 4})
    options: dict[str, Any] = {"num_return_sequences": 5}
    if in_steps:
        # Rows that may end have few pages at first, and more are made in mid-call.
        options["eos_token_id"] = VOCAB - 1
        monkeypatch.setattr(columns_at_once, "FIRST", 2)
        monkeypatch.setattr(reach, "AHEAD", 2)
    grown, copied, at = PageStorage._grown, PageStorage.copy, [0]

    def out_of_memory(*_: Any) -> None:
        at[0] -= 1
        if at[0] < 0:
            raise torch.OutOfMemoryError("simulated")

    def grow(old: Any, shape: Any, like: Any) -> Any:
        out_of_memory()
        return grown(old, shape, like)

    def copying(self: Any, moves: Any, capacity: int) -> None:
        if moves:
            out_of_memory()
        copied(self, moves, capacity)

    expected = sample(stock, **options)
    for count in range(80):
        at[0] = count
        with monkeypatch.context() as patch:
            patch.setattr(PageStorage, "_grown", staticmethod(grow))
            patch.setattr(PageStorage, "copy", copying)
            try:
                sample(model, **options)
            except torch.OutOfMemoryError:
                failed = True
            else:
                failed = False
        assert_books_agree(model)
        assert torch.equal(sample(model, **options), expected)
        if not failed:
            break
        model._fastattn.runtime.groups.shrink(0.0)
    assert (15 if in_steps else 2) < count < 79
    assert_healthy(stock, model)
