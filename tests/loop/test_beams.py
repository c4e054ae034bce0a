"""Beams in the device's loop: stock's sequences, whatever ends them, and every page given back.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

import hf_fastattn
from hf_fastattn.cache import prefix_groups
from hf_fastattn.generation import columns_at_once, prefix_call
from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.loop import beam_loop, decode_loop, device_state
from hf_fastattn.loop.beam_request import BeamRequest
from hf_fastattn.loop.beam_state import BeamShape, BeamState
from hf_fastattn.loop.beam_step import search_step
from hf_fastattn.loop.readback import Readback, StepTokens
from hf_fastattn.loop.request import LoopRequest
from hf_fastattn.pages import reach
from hf_fastattn.transformers_version import CACHE
from tests.loop.test_decode_loop import ENDS, both
from tests.loop.test_decode_loop import run as generated
from tests.loop.test_processors import Mine
from tests.tools.models import CORE, OLD, VOCAB, assert_fast, letters, padded_batch, pair_with_graphs, real_tokens, single

NEW = 24
pytestmark = pytest.mark.usefixtures("device")


def run(model: Any, new: int = NEW, **kwargs: Any) -> Any:
    return generated(model, new, **{"num_beams": 3, **kwargs})


def assert_looped(model: Any) -> Any:
    """The last call ran on the device, from replays alone, and gave all pages back; returns its counters."""
    call = assert_fast(model)
    assert call.fast_loops == 1 and not call.uncaptured and not call.not_looped
    assert call.graphs_replayed == call.forwards - 1
    return call


def assert_same(stock: Any, model: Any, new: int = NEW, **kwargs: Any) -> Any:
    """Stock's sequences from the device's loop; returns the call's counters."""
    assert torch.equal(run(model, new, **kwargs), run(stock, new, **kwargs)), (new, kwargs)
    return assert_looped(model)


@pytest.mark.parametrize("family", [*CORE, "qwen3", "ministral"])
def test_sequences_equal_stock(device: str, family: str) -> None:
    stock, model = both(family, device)
    call = assert_same(stock, model, num_beams=4)
    assert call.forwards == NEW and call.prompt_tokens == real_tokens(padded_batch()) and call.graphs_captured == 1
    # The same steps serve other lengths, penalties and ends, as many as there are.
    assert assert_same(stock, model, 19, num_beams=4, length_penalty=0.3).graphs_captured == 0
    assert assert_same(stock, model, 1, num_beams=4).forwards == 1
    assert_same(stock, model, 2, num_beams=4)


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("early", [False, True, "never"])
def test_ends(device: str, early: bool | str, penalty: float) -> None:
    stock, model = both("qwen2", device)
    asked = {"early_stopping": early, "length_penalty": penalty}
    # Some of the calls end long before their greatest length.
    assert_same(stock, model, 40, eos_token_id=ENDS, num_return_sequences=3, **asked)
    assert_same(stock, model, eos_token_id=ENDS[4], pad_token_id=1, **asked)


def test_a_search_that_ends_early_takes_no_further_steps(device: str) -> None:
    stock, model = both("qwen2", device)
    call = assert_same(stock, model, 40, eos_token_id=ENDS, early_stopping=True)
    assert call.forwards < 40


def test_steps_past_the_end_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host learns of the end some steps late, as it does on a GPU."""
    stock, model = both("qwen2", device)
    launched: list[int] = []
    receive, launch = Readback.receive, decode_loop.DecodeLoop._launch

    def late(self: Readback, wait: bool) -> StepTokens | None:
        return receive(self, wait) if wait else None

    monkeypatch.setattr(Readback, "receive", late)
    monkeypatch.setattr(decode_loop.DecodeLoop, "_launch", lambda self: (launched.append(1), launch(self)))
    call = assert_same(stock, model, 40, eos_token_id=ENDS, early_stopping=True, num_return_sequences=2)
    assert len(launched) > call.forwards - 1


def test_what_was_found_stays_after_the_end(device: str) -> None:
    request = BeamRequest(
        LoopRequest(False, 9, (3,), (), 0, SamplingParams(), 0, None), beams=3, kept=6, returned=3, fill=0,
        powers=tuple(map(float, range(10))), length_penalty=1.0, early_stopping=False,
    )  # fmt: skip
    ids = torch.arange(6 * 4, device=device).view(6, 4)
    state = BeamState(BeamShape.of(request, 6, 4), ids.device, 1, 2)
    step = torch.zeros(1, dtype=torch.int32, device=device)
    scores, tokens = -torch.rand(6, 8, device=device), torch.full((6, 8), 3, device=device)
    changed = []
    for done in (True, False):
        state.begin(request, ids)
        state.is_done.fill_(done)
        before = state.sequences.clone(), state.scores.clone(), state.indices.clone(), state.is_finished.clone()
        search_step(state, (scores, tokens), step, 1.0)
        now = state.sequences, state.scores, state.indices, state.is_finished
        changed.append([not torch.equal(*pair) for pair in zip(before, now, strict=True)])
    assert changed == [[False] * 4, [True] * 4]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.6, "eos_token_id": ENDS},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [5, 9, 77]},
        {"bad_words_ids": [[3], [4, 5]], "sequence_bias": [[[9], 2.0], [[7, 8], 5.0]], "renormalize_logits": True},
        {"min_new_tokens": 9, "eos_token_id": ENDS, "early_stopping": True},
        {"forced_eos_token_id": 5, "remove_invalid_values": True, "begin_suppress_tokens": [11]},
        {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": ENDS[:2]},
    ],
)
def test_processors(device: str, kwargs: dict[str, Any]) -> None:
    stock, model = both("llama", device)
    assert_same(stock, model, **kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 5, "num_return_sequences": 5, **single()},
        {"max_length": 50, "max_new_tokens": None},
        {"input_ids": torch.full((2, 5), 7), "attention_mask": None, "num_beams": 2},
        {"eos_token_id": [3, 4, 5, 6, 7, 8], "num_beams": 7, "num_return_sequences": 2},
    ],
)
def test_what_calls_ask_for(device: str, kwargs: dict[str, Any]) -> None:
    stock, model = both("llama", device)
    assert_same(stock, model, **kwargs)


@pytest.mark.skipif(OLD, reason="embeddings as prompts need their own preparation there")
def test_embeddings_as_prompt(device: str) -> None:
    stock, model = both("llama", device)
    embeds = stock.get_input_embeddings()(padded_batch()["input_ids"].to(device)).detach()
    assert_same(stock, model, input_ids=None, inputs_embeds=embeds, eos_token_id=ENDS)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "qwen2_window"])
def test_pages_that_move_and_steps_recorded_amid_a_search(
    device: str, family: str, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns_at_once, "FIRST", 4)
    monkeypatch.setattr(reach, "AHEAD", 6)
    monkeypatch.setattr(decode_loop, "AHEAD", 6)
    stock, model = both(family, device, {"page_size": page_size})
    # Without an end token there would be pages for all steps from the start.
    call = assert_same(stock, model, 50, eos_token_id=VOCAB - 1)
    assert call.graphs_captured > 1


def test_a_run_before_it_is_recorded_copies_no_page(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write over the tokens of a beam that may yet go on."""
    live: list[torch.Tensor] = []
    fork = beam_loop.fork
    monkeypatch.setattr(beam_loop, "fork", lambda state: (live.append(state.live.clone()), fork(state)))
    _, model = both("llama", device)
    run(model, 6)
    assert [int(value) for value in live][:2] == [1, 0]
    assert device != "cpu" or [int(value) for value in live] == [1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_the_prompt_is_read_once_for_its_beams(device: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_groups, "WORTH_BYTES", 1)
    sharers: set[int] = set()
    launch = decode_loop.DecodeLoop._launch
    monkeypatch.setattr(decode_loop.DecodeLoop, "_launch", lambda self: (sharers.add(self._key.sharers), launch(self)))
    stock, model = both(family, device, {"page_size": 4})
    call = assert_same(stock, model, num_beams=5, eos_token_id=ENDS)
    assert sharers == {8} and call.pages_shared


@pytest.mark.parametrize("prompts", [(0, 1, 0, 1), (0, 0, 1, 1)], ids=["apart", "side by side"])
def test_prompts_that_begin_alike(device: str, prompts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams keep their places, whatever pages their prompts share with those of others."""
    monkeypatch.setattr(prefix_groups, "WORTH_BYTES", 1)
    monkeypatch.setattr(prefix_call, "WORTH_A_TURN", prefix_call.WORTH_ON_CPU)
    stock, model = both("llama", device, {"page_size": 4})
    ids = torch.randint(1, VOCAB, (4, 80), generator=torch.Generator().manual_seed(5))
    for row, document in enumerate(prompts):
        ids[row, :72] = ids[prompts.index(document), :72]
    asked = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    for more in ({}, {"num_return_sequences": 3, "eos_token_id": ENDS}):
        assert torch.equal(run(model, **asked, **more), run(stock, **asked, **more)), more
        call = assert_fast(model)
        # The prompts take two forwards: rows that begin a document, then those that go on from its pages.
        assert call.fast_loops == 1 and not call.not_looped and call.forwards - call.graphs_replayed == 2
        assert call.tokens_reused == 2 * 72


def test_many_shapes_of_searches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_state, "MAX_BEAMS", 1)
    stock, model = both("llama", device)
    for beams in (2, 3, 2):
        assert assert_same(stock, model, 6, num_beams=beams).graphs_captured == 1
    assert len(model._fastattn.runtime.loop_graphs.state._beams) == 1
    # A greedy call amid them has steps of its own.
    assert_same(stock, model, 6, num_beams=1)


class Planned(Exception):
    """Ours, so that nothing else is taken for it."""


@pytest.mark.parametrize("error", [Planned, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 1, 9])
def test_exceptions_lose_no_page(
    device: str, step: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, model = both("qwen2_window", device, {"page_size": 4})
    want = run(stock)
    left, launch = [step], decode_loop.DecodeLoop._launch

    def failing(self: Any) -> None:
        launch(self)
        left[0] -= 1
        if left[0] < 0:
            raise error("planned")

    with monkeypatch.context() as patch, pytest.raises(error, match="planned"):
        patch.setattr(decode_loop.DecodeLoop, "_launch", failing)
        run(model)
    assert model._fastattn.runtime.groups.pages_in_use == 0
    assert torch.equal(run(model), want)
    assert_looped(model)


def test_memory_limit(device: str) -> None:
    page = hf_fastattn.PagedCache(pair_with_graphs("llama")[0].config).groups.page_bytes
    # Two pages of the prompt, and of each beam one for the first 15 new tokens.
    stock, model = both("llama", device, {"memory_limit": 8 * page})
    prompt = single(33)
    assert_same(stock, model, 15, **prompt)
    with pytest.raises(hf_fastattn.CacheFullError, match="memory_limit"):
        run(model, 80, **prompt)
    assert model._fastattn.runtime.groups.pages_in_use == 0
    assert_same(stock, model, 15, **prompt)


OWN_CACHE = "beams whose cache is seen after the call"


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"do_sample": True}, "beams are drawn"),
        ({"return_dict_in_generate": True}, OWN_CACHE),
        ({"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2}, OWN_CACHE),
        ({"logits_processor": LogitsProcessorList([Mine()])}, "a Mine looks at the logits"),
        ({"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}, "beams with a TemperatureLogitsWarper"),
        ({"stop_strings": ["zz"], "tokenizer": letters(), "eos_token_id": 3}, "stop string"),
        ({"max_time": 100.0}, "MaxTime"),
    ],
)
def test_others_run_transformers_loop_and_the_report_says_why(device: str, kwargs: dict[str, Any], reason: str) -> None:
    stock, model = both("llama", device)
    ours, want = run(model, 8, **kwargs), run(stock, 8, **kwargs)
    assert torch.equal(getattr(ours, "sequences", ours), getattr(want, "sequences", want))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and call.forwards > 0
    assert len(call.not_looped) == 1 and reason in next(iter(call.not_looped)), call.not_looped


def test_a_users_cache_stays_theirs(device: str) -> None:
    stock, model = both("llama", device)
    ids = single()["input_ids"]
    batch = {"input_ids": ids, "attention_mask": None}
    cache = hf_fastattn.PagedCache(model.config)
    assert torch.equal(run(model, 8, **batch, **{CACHE: cache}), run(stock, 8, **batch))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and OWN_CACHE in next(iter(call.not_looped))
    assert cache.batch_size == 3 and cache.get_seq_length() == ids.shape[1] + 7


def test_a_model_with_its_own_search(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = both("llama", device)
    base = type(stock)
    own = base._update_finished_beams
    monkeypatch.setattr(base, "_update_finished_beams", lambda self, **kwargs: own(self, **kwargs), raising=False)
    assert torch.equal(run(model, 8), run(stock, 8))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and "_update_finished_beams is its own" in next(iter(call.not_looped))


def test_a_length_penalty_without_a_float(device: str) -> None:
    stock, model = both("llama", device)
    kwargs = {"length_penalty": 900.0, "max_new_tokens": 2}
    want = run(stock, **kwargs)
    assert torch.equal(run(model, **kwargs), want)
