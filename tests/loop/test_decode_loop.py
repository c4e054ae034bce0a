"""The loop that the device runs by itself: stock's tokens, whatever ends rows, and a cache as stock would leave it.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import hf_fastattn
from hf_fastattn.generation import columns_at_once
from hf_fastattn.loop import decode_loop
from hf_fastattn.pages import reach
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import (
    CORE,
    OLD,
    VOCAB,
    assert_fast,
    letters,
    padded_batch,
    pair_with_graphs,
    patch_with_graphs,
    real_tokens,
    single,
    tiny,
)

PLAIN = (
    "llama", "mistral_window", "ministral", "ministral3", "qwen2", "qwen2_window", "qwen3", "qwen3_window",
    "mixtral", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
NEW = 40
# Enough of them that rows end at different steps.
ENDS = list(range(3, 128, 9))


pytestmark = pytest.mark.usefixtures("device")


def run(model: Any, new: int = NEW, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    given = {**padded_batch(), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    given = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    result = model.generate(**given)
    return result.cpu() if isinstance(result, torch.Tensor) else result


def both(family: str, device: str, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    stock, model = pair_with_graphs(family, options)
    return stock.to(device), model.to(device)


def assert_looped(model: Any, held: int = 0) -> Any:
    """The last call ran on the device, from replays alone; returns its counters."""
    call = assert_fast(model, held=held)
    assert call.fast_loops == 1 and not call.uncaptured
    assert call.graphs_replayed == call.forwards - 1
    return call


class Collect(BaseStreamer):
    """Keeps what it was given; fails at one of them if asked to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.parts: list[list[int]] = []
        self.finished, self._fail_at = False, fail_at

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())
        if len(self.parts) == self._fail_at:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.finished = True


@pytest.mark.parametrize("family", PLAIN)
def test_tokens_equal_stock(device: str, family: str) -> None:
    stock, model = both(family, device)
    plain = run(stock, 24)
    for kwargs in ({}, {"eos_token_id": ENDS}, {"repetition_penalty": 1.4, "eos_token_id": ENDS[:3]}):
        want = run(stock, 24, **kwargs) if kwargs else plain
        assert torch.equal(run(model, 24, **kwargs), want), kwargs
        call = assert_looped(model)
        assert call.forwards == want.shape[1] - 37 and call.prompt_tokens == real_tokens(padded_batch())
    # The same steps serve the second call.
    assert torch.equal(run(model, 24), plain) and assert_looped(model).graphs_captured == 0


@pytest.mark.parametrize(
    "kwargs",
    [
        {"min_new_tokens": 12, "eos_token_id": ENDS},
        {"min_length": 50, "eos_token_id": ENDS},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_length": 60},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
        {"input_ids": torch.full((2, 5), 7), "attention_mask": None},
    ],
)
def test_what_calls_ask_for(device: str, kwargs: dict[str, Any]) -> None:
    stock, model = both("qwen2", device)
    assert torch.equal(run(model, **kwargs), run(stock, **kwargs))
    assert_looped(model)


@pytest.mark.parametrize("family", CORE)
def test_rows_that_end_leave_the_batch(device: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "WORTH_CAPTURING", 1)
    sizes: list[int] = []
    compact = decode_loop.DecodeLoop._compact
    monkeypatch.setattr(
        decode_loop.DecodeLoop, "_compact", lambda self, *args: (sizes.append(args[1]), compact(self, *args))
    )
    stock, model = both(family, device)
    batch = padded_batch(9, 37)
    want = run(stock, **batch)
    lengths = [5, 40, 3, 17, 9, 40, 11, 30, 2]
    for row, length in enumerate(lengths):
        want[row, 37 + length :] = 0
    model._fastattn.runtime.row_limits = lengths
    assert torch.equal(run(model, **batch), want)
    assert_looped(model)
    assert sizes == [8, 4, 2]
    used = model._fastattn.runtime.groups
    assert used.pages_in_use == 0


def test_a_returned_cache_is_that_of_stock(device: str) -> None:
    stock, model = both("llama", device)
    options = {"return_dict_in_generate": True, "eos_token_id": ENDS}
    want, ours = run(stock, **options), run(model, **options)
    assert torch.equal(ours.sequences, want.sequences)
    length = want[CACHE].get_seq_length()
    assert ours[CACHE].get_seq_length() == length == want.sequences.shape[1] - 1
    more = torch.randint(1, VOCAB, (3, 5), generator=torch.Generator().manual_seed(3))
    ids = torch.cat((want.sequences.cpu(), more), 1)
    mask = torch.cat((padded_batch()["attention_mask"], torch.ones(3, ids.shape[1] - 37, dtype=torch.long)), 1)
    turn = {"input_ids": ids, "attention_mask": mask}
    second = run(stock, **{CACHE: want[CACHE]}, **turn)
    assert torch.equal(run(model, **{CACHE: ours[CACHE]}, **turn), second)
    assert hf_fastattn.report(model).last_call.fast_loops == 1


def test_streamer(device: str) -> None:
    stock, model = both("qwen2", device)
    theirs, ours = Collect(), Collect()
    run(stock, **single(), streamer=theirs, eos_token_id=ENDS[:2])
    run(model, **single(), streamer=ours, eos_token_id=ENDS[:2])
    assert ours.parts == theirs.parts and ours.finished
    assert_looped(model)


@pytest.mark.parametrize("family", ["llama", "mistral_window"])
def test_interrupted(device: str, family: str) -> None:
    stock, model = both(family, device)
    prompt = single()
    cache = hf_fastattn.PagedCache(model.config, groups=model._fastattn.runtime.groups)
    with pytest.raises(KeyboardInterrupt):
        run(model, **prompt, streamer=Collect(fail_at=8), **{CACHE: cache})
    # The prompt and seven tokens were seen, of which the last is not in the cache yet.
    assert cache.get_seq_length() == prompt["input_ids"].shape[1] + 6
    ids = run(stock, 7, **prompt)
    want = run(stock, 12, input_ids=ids, attention_mask=None)
    assert torch.equal(run(model, 12, input_ids=ids, attention_mask=None, **{CACHE: cache}), want)
    cache.reset()
    with pytest.raises(KeyboardInterrupt):
        run(model, **prompt, streamer=Collect(fail_at=8))
    assert model._fastattn.runtime.groups.pages_in_use == 0
    assert torch.equal(run(model, **prompt), run(stock, **prompt))
    assert_looped(model)


@pytest.mark.parametrize("rows", [1, 3])
def test_stop_strings(device: str, rows: int) -> None:
    stock, model = both("llama", device)
    batch = padded_batch(rows) if rows > 1 else single()
    tokenizer = letters()
    text = tokenizer.decode(run(stock, **batch)[0, -20:])
    kwargs = {"stop_strings": [text[2:4], text[8:11]], "tokenizer": tokenizer, "eos_token_id": ENDS[:1], **batch}
    assert torch.equal(run(model, **kwargs), run(stock, **kwargs))
    assert_looped(model)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2_window"])
def test_pages_that_move_in_mid_generation(
    device: str, family: str, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns_at_once, "FIRST", 8)
    monkeypatch.setattr(reach, "AHEAD", 8)
    monkeypatch.setattr(decode_loop, "AHEAD", 8)
    stock, model = both(family, device, {"page_size": page_size})
    # Without an end token there would be pages for all steps from the start.
    ends = {"eos_token_id": VOCAB - 1}
    assert torch.equal(run(model, 90, **ends), run(stock, 90, **ends))
    assert assert_looped(model).graphs_captured > 1


def test_pages_behind_a_window_are_released(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "AHEAD", 8)
    stock, model = both("mistral_window", device, {"page_size": 4})
    most: list[int] = []
    take = decode_loop.DecodeLoop._take
    groups = model._fastattn.runtime.groups
    monkeypatch.setattr(
        decode_loop.DecodeLoop, "_take", lambda self, packed: (most.append(groups.pages_in_use), take(self, packed))
    )
    assert torch.equal(run(model, 120), run(stock, 120))
    # Three rows of a window of 24 tokens, and what is reserved ahead or released late.
    assert max(most[40:]) <= 3 * (24 + 8 + 8 + 12) // 4


def test_memory_limit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = hf_fastattn.PagedCache(tiny("llama").config).groups.page_bytes
    # Room for the prompt and 40 tokens, but not for 64 at a time.
    stock, model = both("llama", device, {"memory_limit": 5 * page})
    prompt = single(33)
    assert torch.equal(run(model, 40, **prompt), run(stock, 40, **prompt))
    assert_looped(model)
    with pytest.raises(hf_fastattn.CacheFullError, match="memory_limit"):
        run(model, 80, **prompt)
    assert model._fastattn.runtime.groups.pages_in_use == 0
    assert torch.equal(run(model, 40, **prompt), run(stock, 40, **prompt))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"no_repeat_ngram_size": 40}, "no_repeat_ngram_size"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"max_time": 100.0}, "MaxTime"),
    ],
)
def test_other_calls_run_transformers_loop(
    device: str, kwargs: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    stock, model = both("llama", device)
    with caplog.at_level("INFO", "hf_fastattn"):
        ours, want = run(model, **kwargs), run(stock, **kwargs)
    assert torch.equal(getattr(ours, "sequences", ours), getattr(want, "sequences", want))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and call.forwards == NEW
    assert reason in caplog.text


def test_a_mask_that_hides_the_cache_runs_transformers_loop(device: str) -> None:
    stock, model = both("mistral_window", device)
    mask = torch.ones(3, 37, dtype=torch.long)
    mask[1, 20:24] = 0
    assert torch.equal(run(model, attention_mask=mask), run(stock, attention_mask=mask))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and sum(call.fallbacks.values()) == NEW


def test_a_call_inside_a_streamer(device: str) -> None:
    stock, model = both("llama", device)
    inner: list[torch.Tensor] = []

    class Nested(Collect):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.parts) == 9:
                inner.append(run(model, 5, **single(11)))

    prompt = single()
    assert torch.equal(run(model, **prompt, streamer=Nested()), run(stock, **prompt))
    assert torch.equal(inner[0], run(stock, 5, **single(11)))


def test_draws_depend_on_seed_row_and_step_alone(device: str) -> None:
    model = patch_with_graphs(tiny("llama").to(device), sampling="fast")
    ids = single()["input_ids"]
    sample = {"do_sample": True, "temperature": 3.0, "attention_mask": None}
    four = run(model, input_ids=ids.expand(4, -1), **sample)
    assert_looped(model)
    assert len({tuple(row) for row in four.tolist()}) == 4
    assert torch.equal(run(model, input_ids=ids.expand(4, -1), **sample), four)
    assert torch.equal(run(model, input_ids=ids.expand(2, -1), **sample), four[:2])
    model._fastattn.runtime.row_limits = [3, NEW, 5, NEW]
    fewer = run(model, input_ids=ids.expand(4, -1), **sample)
    assert torch.equal(fewer[[1, 3]], four[[1, 3]])


def test_transformers_own_draws(device: str) -> None:
    stock, model = both("llama", device, {"sampling": "transformers"})
    sample = {"do_sample": True, "temperature": 3.0}
    assert torch.equal(run(model, **sample), run(stock, **sample))
    assert hf_fastattn.report(model).last_call.fast_loops == 0


@pytest.mark.skipif(OLD, reason="embeddings as prompts need their own preparation there")
def test_embeddings_as_prompt(device: str) -> None:
    stock, model = both("llama", device)
    embeds = stock.get_input_embeddings()(padded_batch()["input_ids"].to(device))
    kwargs = {"input_ids": None, "inputs_embeds": embeds}
    assert torch.equal(run(model, **kwargs), run(stock, **kwargs))
    assert_looped(model)


def test_a_head_larger_than_the_vocabulary(device: str) -> None:
    stock, model = both("llama", device)
    for candidate in (stock, model):
        # As after padding to a multiple; the configuration keeps its number.
        head = torch.nn.Linear(64, VOCAB + 16, bias=False, device=device)
        with torch.no_grad():
            head.weight[:VOCAB] = candidate.lm_head.weight
            head.weight[VOCAB:] = 0
        candidate.lm_head = head
    kwargs = {"repetition_penalty": 1.4, "eos_token_id": ENDS}
    assert torch.equal(run(model, **kwargs), run(stock, **kwargs))
    assert_looped(model)
