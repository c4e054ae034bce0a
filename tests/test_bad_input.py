"""What goes wrong says what was given; afterwards model, pages and random generator are as they should be."""

from __future__ import annotations

import re
import threading
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
from tests.models import CORE, VOCAB, assert_fast, padded_batch, pair, real_tokens, single, tiny

# Bytes of a page of 16 tokens over the 3 layers of the llama of tests/models.py: K and V, 2 heads of 16, fp32.
PAGE_BYTES = 2 * 3 * 16 * 2 * 16 * 4


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


def sample(model: Any, batch: Any = None, new: int = 12, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(0)
    batch = single() if batch is None else batch
    options = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "temperature": 1.5}
    return model.generate(**batch, **{**options, **kwargs})


def assert_healthy(stock: Any, model: Any) -> None:
    """No page is held, and the next calls are as in stock, to the state of the random generator."""
    assert hf_fastattn.report(model).pages_in_use == 0
    for options in ({}, {"num_return_sequences": 3}):
        expected = sample(stock, padded_batch(), **options)
        state = torch.get_rng_state()
        assert torch.equal(sample(model, padded_batch(), **options), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert_fast(model, real_tokens(padded_batch()))


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
        model(ids[:, :37], past_key_values=cache)
        stock(ids[:, :37], past_key_values=theirs)
        pages = cache.groups.pages_in_use
        Interrupt(model.get_submodule(where), 0)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 40 : 40 + size], past_key_values=cache)
        assert cache.get_seq_length() == 37
        assert cache.groups.pages_in_use == pages
        for part in (ids[:, 37 : 37 + size], ids[:, 50:51]):
            ours = model(part, past_key_values=cache).logits
            expected = stock(part, past_key_values=theirs).logits
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert_fast(model)


def test_interrupt_in_the_first_forward_of_a_users_cache() -> None:
    stock, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config)
    Interrupt(model.model.layers[1], 0)
    with pytest.raises(KeyboardInterrupt):
        sample(model, past_key_values=cache)
    assert cache.get_seq_length() == 0 and cache.groups.pages_in_use == 0
    # Nothing was stored, so another number of rows is fine.
    assert torch.equal(sample(model, padded_batch(), past_key_values=cache), sample(stock, padded_batch()))


def test_a_users_cache_goes_on_after_an_interrupted_generate() -> None:
    stock, model = pair("qwen2_window")
    cache = hf_fastattn.PagedCache(model.config)
    whole = sample(stock, single(), 24, do_sample=False)
    Interrupt(model.model.layers[1], 7)
    with pytest.raises(KeyboardInterrupt):
        sample(model, single(), 24, do_sample=False, past_key_values=cache)
    length = cache.get_seq_length()
    assert length == 37 + 6
    known = {"input_ids": whole[:, : length + 1]}
    rest = sample(model, known, 24 - 7, do_sample=False, past_key_values=cache)
    assert torch.equal(rest, whole)


def filled(family: str = "llama", dtype: torch.dtype = torch.float32, **over: Any) -> Any:
    """A paged cache that holds the prompt of another model."""
    model = hf_fastattn.patch(tiny(family, **over).to(dtype))
    cache = hf_fastattn.PagedCache(model.config)
    with torch.no_grad():
        model(single()["input_ids"], past_key_values=cache)
    return cache


OTHERS: dict[str, Callable[[], Any]] = {
    "kv heads, filled": lambda: filled(num_key_value_heads=4),
    "layers, filled": lambda: filled(num_hidden_layers=2),
    "more layers, filled": lambda: filled(num_hidden_layers=5),
    "windows, filled": lambda: filled("qwen2_window"),
    "dtype, filled": lambda: filled(dtype=torch.float64),
    "kv heads, empty": lambda: hf_fastattn.PagedCache(tiny("llama", num_key_value_heads=4).config),
    "layers, empty": lambda: hf_fastattn.PagedCache(tiny("llama", num_hidden_layers=2).config),
    "windows, empty": lambda: hf_fastattn.PagedCache(tiny("qwen2_window").config),
}


@pytest.mark.parametrize("what", OTHERS)
def test_cache_of_another_model(what: str) -> None:
    stock, model = pair("llama")
    cache = OTHERS[what]()
    length, pages = cache.get_seq_length(), cache.groups.pages_in_use
    batch = {"input_ids": torch.cat([single()["input_ids"], single(5, 3)["input_ids"]], 1)}
    with pytest.raises(ValueError, match="past_key_values"):
        sample(model, batch, past_key_values=cache)
    assert cache.get_seq_length() == length
    assert cache.groups.pages_in_use == pages
    assert_healthy(stock, model)


def test_cache_of_another_batch_size() -> None:
    stock, model = pair("llama")
    cache = filled()
    with pytest.raises(ValueError, match=r"(?s)1 row.*3"), torch.no_grad():
        model(padded_batch()["input_ids"][:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 37
    assert_healthy(stock, model)


def test_cache_together_with_another_implementation() -> None:
    """Refused by Transformers itself."""
    _, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config)
    with pytest.raises(ValueError, match="cache_implementation"):
        sample(model, past_key_values=cache, cache_implementation="static")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "do_sample": False}])
def test_full_cache(options: dict[str, Any]) -> None:
    limit = 4 * PAGE_BYTES
    stock, model = pair("llama", {"memory_limit": limit})
    with pytest.raises(hf_fastattn.CacheFullError) as full:
        sample(model, single(), 64, **options)
    said = str(full.value)
    assert str(limit) in said and re.search(r"\b4 pages\b", said) and "64 tokens" in said
    assert hf_fastattn.report(model).pages_in_use == 0
    with pytest.raises(hf_fastattn.CacheFullError):
        sample(model, single(100), 4, **options)
    assert hf_fastattn.report(model).pages_in_use == 0
    # 37 tokens of the prompt and 27 of the answer are 64; the last one is not stored.
    assert torch.equal(sample(model, single(), 27), sample(stock, single(), 27))
    assert_fast(model, 37)
    with pytest.raises(hf_fastattn.CacheFullError):
        sample(model, single(), 29)


def test_samples_fit_where_copies_would_not() -> None:
    stock, model = pair("llama", {"memory_limit": 12 * PAGE_BYTES})
    # Two whole pages of prompt, shared, and one page for each of 8 answers; unshared it would be 24.
    options = {"num_return_sequences": 8}
    expected = sample(stock, single(32), 12, **options)
    assert torch.equal(sample(model, single(32), 12, **options), expected)
    assert_fast(model, 32, shared=True)


def test_full_cache_of_the_user_stays_usable() -> None:
    stock, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig(memory_limit=3 * PAGE_BYTES))
    ids = single(60)["input_ids"]
    with torch.no_grad():
        model(ids[:, :37], past_key_values=cache)
        with pytest.raises(hf_fastattn.CacheFullError):
            model(ids[:, 37:], past_key_values=cache)
        assert cache.get_seq_length() == 37 and cache.groups.pages_in_use == 3
        ours = model(ids[:, 37:48], past_key_values=cache).logits
        expected = stock(ids[:, :48]).logits[:, 37:]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_limit_below_one_page() -> None:
    _, model = pair("llama", {"memory_limit": 100})
    with pytest.raises(hf_fastattn.CacheFullError, match="100"):
        sample(model)
    assert hf_fastattn.report(model).pages_in_use == 0


def assert_as_stock(batch: dict[str, torch.Tensor], family: str, **options: Any) -> None:
    """Patched and stock agree: on the tokens, or on the type of the error."""
    stock, model = pair(family)
    outcomes: list[Any] = []
    for side in (stock, model):
        try:
            outcomes.append(sample(side, batch, do_sample=False, **options))
        except Exception as error:
            outcomes.append(error)
    expected, ours = outcomes
    if isinstance(expected, Exception):
        assert isinstance(ours, (type(expected), ValueError)), (expected, ours)
    else:
        assert torch.is_tensor(ours), ours
        assert torch.equal(ours, expected)
    assert_healthy(stock, model)


def changed(rows: slice | int, columns: slice, value: int = 0) -> dict[str, torch.Tensor]:
    """The padded batch with a part of its mask set to `value`."""
    batch = padded_batch()
    batch["attention_mask"][rows, columns] = value
    return batch


ALL = slice(None)
MASKS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "holes in one row": lambda: changed(0, slice(12, 17)),
    "holes in all rows": lambda: changed(ALL, slice(31, 34)),
    "right padding of one row": lambda: changed(1, slice(33, None)),
    "right padding of all rows": lambda: changed(ALL, slice(35, None)),
    "hole before the last token": lambda: changed(ALL, slice(35, 36)),
    "one token": lambda: changed(2, slice(0, 36)),
}


@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("beams", [1, 3])
def test_unusual_masks(what: str, family: str, beams: int) -> None:
    assert_as_stock(MASKS[what](), family, num_beams=beams)


@pytest.mark.parametrize("family", CORE)
def test_empty_prompt_row(family: str) -> None:
    """As in stock, or an error that names the row; the other rows don't matter then."""
    stock, model = pair(family)
    batch = changed(2, ALL)
    try:
        tokens = sample(model, batch, do_sample=False)
    except ValueError as error:
        assert re.search(r"\b2\b", str(error)) and "attention_mask" in str(error)
    else:
        assert torch.equal(tokens, sample(stock, batch, do_sample=False))
    assert_healthy(stock, model)


def test_all_rows_empty() -> None:
    stock, model = pair("llama")
    batch = changed(ALL, ALL)
    try:
        tokens = sample(model, batch, do_sample=False)
    except ValueError as error:
        assert "attention_mask" in str(error)
    else:
        assert torch.equal(tokens, sample(stock, batch, do_sample=False))
    assert_healthy(stock, model)


@pytest.mark.parametrize("shape", [(3, 0), (0, 5)])
def test_empty_input(shape: tuple[int, int]) -> None:
    assert_as_stock({"input_ids": torch.zeros(shape, dtype=torch.long)}, "llama")


@pytest.mark.parametrize("new", [0, -1])
def test_no_new_tokens(new: int) -> None:
    assert_as_stock(padded_batch(), "llama", max_new_tokens=new)


def test_max_length_below_the_prompt() -> None:
    assert_as_stock(padded_batch(), "llama", max_new_tokens=None, max_length=20)


def test_mask_of_another_shape() -> None:
    batch = padded_batch()
    batch["attention_mask"] = batch["attention_mask"][:, :30]
    stock, model = pair("llama")
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        sample(model, batch)
    assert_healthy(stock, model)


def test_token_out_of_the_vocabulary() -> None:
    batch = single()
    batch["input_ids"][0, 5] = VOCAB + 3
    assert_as_stock(batch, "llama")


def test_unknown_generate_argument() -> None:
    assert_as_stock(padded_batch(), "llama", max_new_tokens=4, colour="red")


@pytest.mark.parametrize("family", CORE)
def test_bool_mask(family: str) -> None:
    batch = padded_batch()
    batch["attention_mask"] = batch["attention_mask"].bool()
    stock, model = pair(family)
    expected = sample(stock, padded_batch(), do_sample=False)
    with torch.no_grad():
        logits = model(**batch, past_key_values=hf_fastattn.PagedCache(model.config)).logits
    assert torch.equal(logits[:, -1].argmax(-1), expected[:, 37])
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
def test_four_dimensional_mask_falls_back(family: str) -> None:
    stock, model = pair(family)
    ids = padded_batch(2)["input_ids"].clamp_min(1)
    allowed = torch.ones(2, 1, 37, 37).tril().bool()
    allowed[:, :, 20:, 3:9] = False
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    masks: Any = bias
    if family == "qwen2_window":
        masks = {"full_attention": bias, "sliding_attention": bias}
    with torch.no_grad():
        expected = stock(ids, attention_mask=masks).logits
        cache = hf_fastattn.PagedCache(model.config)
        ours = model(ids, attention_mask=masks, past_key_values=cache).logits
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    fallbacks = hf_fastattn.report(model).last_call.fallbacks
    assert fallbacks and all("mask" in reason for reason in fallbacks)


class Elsewhere(LogitsProcessor):
    """Calls the model from a second thread."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.errors: list[Exception] = []

    def work(self) -> None:
        try:
            sample(self.model)
        except RuntimeError as error:
            self.errors.append(error)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=self.work)
        thread.start()
        thread.join()
        return scores


def test_a_second_thread_is_told() -> None:
    stock, model = pair("llama")
    other = Elsewhere(model)
    tokens = sample(model, do_sample=False, logits_processor=LogitsProcessorList([other]))
    assert torch.equal(tokens, sample(stock, do_sample=False))
    assert len(other.errors) == 12 and all("thread" in str(error) for error in other.errors)
    assert_healthy(stock, model)
