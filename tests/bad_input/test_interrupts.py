"""Exceptions at any point of `generate()`: afterwards model, pages and random generator are as they should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.bad_input.healthy import assert_healthy, sample
from tests.tools.models import CORE, VOCAB, assert_fast, padded_batch, pair, single, tiny


class Boom(Exception):
    """Ours, so that nothing else is taken for it."""


class AfterSteps:
    """Raises at its call number `step` (from 0)."""

    def __init__(self, step: int, error: type[BaseException] = Boom) -> None:
        self.left = step
        self.error = error

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("planned")


class BadStreamer(BaseStreamer, AfterSteps):
    def put(self, value: torch.Tensor) -> None:
        self.tick()

    def end(self) -> None:
        pass


class BadProcessor(LogitsProcessor, AfterSteps):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        return scores


class BadCriterion(StoppingCriteria, AfterSteps):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tick()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


PLACES: dict[str, Callable[[int, type[BaseException]], dict[str, Any]]] = {
    "streamer": lambda step, error: {"streamer": BadStreamer(step, error)},
    "processor": lambda step, error: {"logits_processor": LogitsProcessorList([BadProcessor(step, error)])},
    "criterion": lambda step, error: {"stopping_criteria": StoppingCriteriaList([BadCriterion(step, error)])},
}


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 1, 6])
@pytest.mark.parametrize("place", PLACES)
def test_exception_in_a_users_object(place: str, step: int, error: type[BaseException]) -> None:
    stock, model = pair("qwen2_window")
    with pytest.raises(error, match="planned"):
        sample(stock, **PLACES[place](step, error))
    state = torch.get_rng_state()
    with pytest.raises(error, match="planned"):
        sample(model, **PLACES[place](step, error))
    assert torch.equal(torch.get_rng_state(), state)
    assert_healthy(stock, model)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 4},
        {"num_beams": 3, "do_sample": False},
        {"prefill_chunk_size": 8},
        {"prompt_lookup_num_tokens": 3},
    ],
)
def test_exception_in_other_modes(options: dict[str, Any]) -> None:
    stock, model = pair("llama")
    for step in (0, 2):
        with pytest.raises(Boom):
            sample(model, **PLACES["processor"](step, Boom), **options)
        assert hf_fastattn.report(model).pages_in_use == 0
    assert_healthy(stock, model)


@pytest.mark.parametrize("step", [0, 3])
def test_exception_in_assisted_generation(step: int) -> None:
    stock, model = pair("llama")
    assistant = hf_fastattn.patch(tiny("llama", seed=2))
    with pytest.raises(Boom):
        sample(model, assistant_model=assistant, **PLACES["criterion"](step, Boom))
    assert hf_fastattn.report(assistant).pages_in_use == 0
    assert_healthy(stock, model)


class Interrupt:
    """Ctrl-C inside a layer, at its forward number `step` (from 0)."""

    def __init__(self, module: torch.nn.Module, step: int) -> None:
        self.left = step
        self.handle = module.register_forward_hook(self)

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left < 0:
            self.handle.remove()
            raise KeyboardInterrupt


WHERE = [
    "model.layers.1",
    "model.layers.1.self_attn",
    "model.layers.2.self_attn.o_proj",
    "model.norm",
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_interrupt_inside_a_layer(where: str, step: int) -> None:
    stock, model = pair("qwen2_window")
    Interrupt(model.get_submodule(where), step)
    with pytest.raises(KeyboardInterrupt):
        sample(model, padded_batch())
    assert_healthy(stock, model)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("family", CORE)
def test_a_cache_survives_an_interrupted_forward(family: str, size: int, where: str) -> None:
    stock, model = pair(family)
    cache, theirs = hf_fastattn.PagedCache(model.config), DynamicCache(config=stock.config)
    ids = torch.randint(1, VOCAB, (2, 60), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model(ids[:, :37], **{CACHE: cache})
        stock(ids[:, :37], **{CACHE: theirs})
        pages = cache.groups.pages_in_use
        Interrupt(model.get_submodule(where), 0)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 40 : 40 + size], **{CACHE: cache})
        assert cache.get_seq_length() == 37
        assert cache.groups.pages_in_use == pages
        for part in (ids[:, 37 : 37 + size], ids[:, 50:51]):
            ours = model(part, **{CACHE: cache}).logits
            expected = stock(part, **{CACHE: theirs}).logits
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert_fast(model, held=cache.groups.pages_in_use)


def test_interrupt_in_the_first_forward_of_a_users_cache() -> None:
    stock, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config)
    Interrupt(model.model.layers[1], 0)
    with pytest.raises(KeyboardInterrupt):
        sample(model, **{CACHE: cache})
    assert cache.get_seq_length() == 0 and cache.groups.pages_in_use == 0
    # Nothing was stored, so another number of rows is fine.
    assert torch.equal(sample(model, padded_batch(), **{CACHE: cache}), sample(stock, padded_batch()))


def test_a_users_cache_goes_on_after_an_interrupted_generate() -> None:
    stock, model = pair("qwen2_window")
    cache = hf_fastattn.PagedCache(model.config)
    whole = sample(stock, single(), 24, do_sample=False)
    Interrupt(model.model.layers[1], 7)
    with pytest.raises(KeyboardInterrupt):
        sample(model, single(), 24, do_sample=False, **{CACHE: cache})
    length = cache.get_seq_length()
    assert length == 37 + 6
    known = {"input_ids": whole[:, : length + 1]}
    rest = sample(model, known, 24 - 7, do_sample=False, **{CACHE: cache})
    assert torch.equal(rest, whole)
