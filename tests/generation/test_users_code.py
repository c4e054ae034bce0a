"""What a user hangs into `generate()`: streamers, logits processors, stopping criteria."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import hf_fastattn
from tests.generation.calls import SAMPLING, assert_same_tokens, run
from tests.tools.models import CORE, assert_fast, letters, padded_batch, pair, real_tokens, single


class Collect(BaseStreamer):
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("options", [{}, SAMPLING, {"prompt_lookup_num_tokens": 3}])
def test_streamer(family: str, options: dict[str, Any]) -> None:
    stock, model = pair(family)
    theirs, ours = Collect(), Collect()
    run(stock, single(), 24, streamer=theirs, **options)
    run(model, single(), 24, streamer=ours, **options)
    assert ours.parts == theirs.parts and ours.ended
    assert_fast(model)


class SeenBefore(LogitsProcessor):
    """Depends on the whole history of its row."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        history = torch.nn.functional.one_hot(input_ids, scores.shape[-1]).sum(1)
        return scores - 0.1 * history * input_ids.shape[1] ** 0.5


@pytest.mark.parametrize("options", [{}, SAMPLING, {"num_beams": 3}, {"num_return_sequences": 2}])
def test_logits_processors(options: dict[str, Any]) -> None:
    stock, model = pair("llama")
    if "num_return_sequences" in options:
        options = {**options, **SAMPLING}
    batch = padded_batch()
    assert_same_tokens(
        stock,
        model,
        batch,
        24,
        logits_processor=LogitsProcessorList([SeenBefore()]),
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        **options,
    )
    assert_fast(model, real_tokens(batch))


def test_classifier_free_guidance() -> None:
    """A processor that calls the model itself, with a cache of its own."""
    stock, model = pair("qwen2")
    assert_same_tokens(stock, model, single(), 16, guidance_scale=1.5)
    assert hf_fastattn.report(model).pages_in_use == 0


class RowStops(StoppingCriteria):
    """Row r stops once the whole is 40 + 3 r tokens long."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] >= 40 + 3 * torch.arange(input_ids.shape[0])


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("options", [{}, SAMPLING])
def test_stopping_criteria(family: str, options: dict[str, Any]) -> None:
    stock, model = pair(family)
    tokens = assert_same_tokens(
        stock,
        model,
        padded_batch(),
        24,
        stopping_criteria=StoppingCriteriaList([RowStops()]),
        pad_token_id=0,
        **options,
    )
    assert tokens.shape[1] == 46
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_end_at_different_steps(family: str, beams: int) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    free = run(stock, batch, 24)[:, 37:]
    ends = [int(free[0, 4]), int(free[1, 11]), int(free[2, 19])]
    tokens = assert_same_tokens(stock, model, batch, 48, eos_token_id=ends, num_beams=beams)
    assert tokens.shape[1] < 37 + 48
    assert beams > 1 or (tokens[:, 37:] == 0).any()
    assert_fast(model, real_tokens(batch))


@pytest.mark.parametrize("family", CORE)
def test_stop_strings(family: str) -> None:
    stock, model = pair(family)
    batch, tokenizer = padded_batch(), letters()
    free = run(stock, batch, 24)
    strings = [tokenizer.decode(free[row, 45 + row : 47 + row]) for row in range(3)]
    tokens = assert_same_tokens(stock, model, batch, 24, stop_strings=strings, tokenizer=tokenizer)
    assert tokens.shape[1] <= 49
    assert_fast(model, real_tokens(batch))


class Asks(LogitsProcessor):
    """Generates with the same model in the middle of its generation."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        guess = self.model.generate(input_ids, max_new_tokens=2, do_sample=False, num_beams=2, num_return_sequences=2)
        return scores.scatter_add(1, guess[::2, -1:], torch.full_like(scores[:, :1], 2.0))


def test_generate_inside_generate() -> None:
    stock, model = pair("qwen2_window")
    expected = run(stock, single(), 12, logits_processor=LogitsProcessorList([Asks(stock)]))
    tokens = run(model, single(), 12, logits_processor=LogitsProcessorList([Asks(model)]))
    assert torch.equal(tokens, expected)
    assert_fast(model)
