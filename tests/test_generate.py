"""`generate()` of a patched model gives stock Transformers' outputs, and our path did the work."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
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
from tests.models import (
    CORE,
    OLD,
    VOCAB,
    assert_fast,
    letters,
    noisy,
    padded_batch,
    pair,
    real_tokens,
    single,
    tiny,
)

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 0}
Batch = Mapping[str, torch.Tensor]


def run(model: Any, batch: Batch, new: int = 24, **kwargs: Any) -> Any:
    """`generate()` under a fixed seed, greedy unless told otherwise."""
    torch.manual_seed(0)
    return model.generate(**batch, **{"max_new_tokens": new, "do_sample": False, **kwargs})


def assert_same_tokens(stock: Any, model: Any, batch: Batch, new: int = 24, **kwargs: Any) -> Any:
    """Same call, same tokens, and the random generator left in the same state; returns the tokens."""
    expected = run(stock, batch, new, **kwargs)
    state = torch.get_rng_state()
    tokens = run(model, batch, new, **kwargs)
    assert torch.equal(tokens, expected)
    assert torch.equal(torch.get_rng_state(), state)
    return tokens


def assert_fresh_rows(tokens: torch.Tensor, prompt_length: int) -> None:
    """The rows generated different tokens, so that a mix-up of rows could be seen."""
    new = tokens[:, prompt_length:]
    assert len({tuple(row.tolist()) for row in new}) == len(new)
    assert all(len(set(row.tolist())) > 8 for row in new)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("family", CORE)
def test_greedy(family: str, page_size: int) -> None:
    stock, model = pair(family, {"page_size": page_size})
    batch = padded_batch()
    tokens = assert_same_tokens(stock, model, batch, 64)
    assert_fresh_rows(tokens, 37)
    call = assert_fast(model, real_tokens(batch), shared=False)
    assert call.forwards == 64


@pytest.mark.parametrize("family", CORE)
def test_four_beams(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    tokens = assert_same_tokens(stock, model, batch, 64, num_beams=4)
    assert_fresh_rows(tokens, 37)
    call = assert_fast(model, real_tokens(batch), shared=True)
    assert call.forwards == 64


@pytest.mark.parametrize("family", CORE)
def test_sampling(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    assert_same_tokens(stock, model, batch, 64, **SAMPLING)
    assert_fast(model, real_tokens(batch), shared=False)
    assert_same_tokens(stock, model, batch, 8, do_sample=True, top_k=5, top_p=0.9)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [1, 3])
def test_samples_share_the_prompt(family: str, rows: int) -> None:
    stock, model = pair(family)
    batch = padded_batch(rows)
    tokens = assert_same_tokens(stock, model, batch, 24, num_return_sequences=8, **SAMPLING)
    assert_fresh_rows(tokens, 37)
    assert_fast(model, real_tokens(batch), shared=True)


def test_samples_copy_only_the_last_page() -> None:
    stock, model = pair("llama", {"page_size": 16})
    batch = single(37)
    assert_same_tokens(stock, model, batch, 8, num_return_sequences=8, **SAMPLING)
    call = assert_fast(model, 37, shared=True)
    # 3 pages of the prompt, then at most a copy of the last one for all samples: none needs a 4th page.
    assert call.pages_allocated <= 3 + 8
    assert call.pages_copied <= 8


def test_a_sliding_window_gives_pages_back() -> None:
    stock, model = pair("qwen2_window", {"page_size": 4}, max_window_layers=0)
    cache = hf_fastattn.PagedCache(model.config, hf_fastattn.FastAttnConfig(page_size=4))
    expected = run(stock, single(), 64)
    tokens = run(model, single(), 64, past_key_values=cache)
    assert torch.equal(tokens, expected)
    # A window of 24 keys spans at most 7 pages of 4 tokens; 100 tokens would take 25.
    assert_fast(model, 37, held=None)
    assert 6 <= cache.groups.pages_in_use <= 7


@pytest.mark.parametrize("family", CORE)
def test_beams_with_return_sequences(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    options = {"num_beams": 4, "num_return_sequences": 3}
    assert_same_tokens(stock, model, batch, 32, **options)
    assert_fast(model, real_tokens(batch), shared=True)
    assert_same_tokens(stock, model, batch, 16, do_sample=True, **options)
    assert_fast(model, real_tokens(batch), shared=True)


@pytest.mark.parametrize("family", CORE)
def test_identical_rows_are_computed_once(family: str) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    order = torch.tensor([0, 1, 0, 2, 1, 0])
    repeated = {name: value[order] for name, value in batch.items()}
    assert_same_tokens(stock, model, repeated, 32, **SAMPLING)
    assert_fast(model, real_tokens(batch), shared=True)


def test_identical_rows_of_different_padding() -> None:
    stock, model = pair("llama")
    one = single(20)["input_ids"]
    ids = torch.cat([torch.cat([torch.zeros(1, 5, dtype=one.dtype), one[:, 5:]], 1), one])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert_same_tokens(stock, model, {"input_ids": ids, "attention_mask": mask}, 24)
    assert_fast(model, 35)


@pytest.mark.parametrize("order", [[0, 0], [0, 1]])
def test_rows_that_differ_only_in_padding_tokens(order: list[int]) -> None:
    """What stands under the mask must not matter."""
    stock, model = pair("qwen2")
    ids = single(20)["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    ids[0, :5], ids[1, :5] = 7, 9
    assert_same_tokens(stock, model, {"input_ids": ids[order], "attention_mask": mask}, 24)
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("patched_assistant", [False, True])
def test_assisted(family: str, sampling: bool, patched_assistant: bool) -> None:
    if family == "qwen2_window" and OLD and not patched_assistant:
        pytest.skip("stock cannot crop a cache with a sliding window in this version")
    stock, model = pair(family)
    assistant = noisy(tiny(family))
    if patched_assistant:
        hf_fastattn.patch(assistant)
    tokens = run(model, single(), 48, assistant_model=assistant, **(SAMPLING if sampling else {}))
    if not sampling:
        expected = run(stock, single(), 48)
    elif family == "qwen2_window" and OLD:
        pytest.skip("stock cannot crop a cache with a sliding window in this version")
    else:
        expected = run(stock, single(), 48, assistant_model=noisy(tiny(family)), **SAMPLING)
    assert torch.equal(tokens, expected)
    call = assert_fast(model)
    # Some guesses were right, some were not.
    assert 4 < call.forwards < 48
    if patched_assistant:
        assert_fast(assistant)


@pytest.mark.parametrize("family", CORE)
def test_assistant_that_is_always_wrong(family: str) -> None:
    stock, model = pair(family)
    assistant = tiny(family, seed=9)
    if family == "qwen2_window" and OLD:
        # Stock's own cache could not be cropped.
        hf_fastattn.patch(assistant)
    tokens = run(model, single(), 48, assistant_model=assistant)
    assert torch.equal(tokens, run(stock, single(), 48))
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
def test_assistant_early_exit(family: str) -> None:
    stock, model = pair(family)
    tokens = run(model, single(), 32, assistant_early_exit=2)
    assert torch.equal(tokens, run(stock, single(), 32))
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("sampling", [False, True])
def test_prompt_lookup(family: str, sampling: bool) -> None:
    stock, model = pair(family)
    text = single(13)["input_ids"].repeat(1, 3)
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    options: dict[str, Any] = dict(SAMPLING) if sampling else {}
    if family == "qwen2_window" and OLD and sampling:
        pytest.skip("stock cannot crop a cache with a sliding window in this version")
    tokens = run(model, batch, 48, prompt_lookup_num_tokens=4, **options)
    if sampling:
        options["prompt_lookup_num_tokens"] = 4
    assert torch.equal(tokens, run(stock, batch, 48, **options))
    assert_fast(model)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [1, 3])
def test_chunked_prefill(family: str, rows: int) -> None:
    stock, model = pair(family)
    batch = padded_batch(rows)
    assert_same_tokens(stock, model, batch, 24, prefill_chunk_size=8)
    assert_fast(model, real_tokens(batch))


def test_chunked_prefill_of_samples() -> None:
    stock, model = pair("qwen2_window")
    batch = padded_batch(2)
    assert_same_tokens(stock, model, batch, 12, prefill_chunk_size=8, num_return_sequences=3, **SAMPLING)
    assert_fast(model, real_tokens(batch), shared=True)


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


def assert_close(ours: torch.Tensor, stock: torch.Tensor, what: str) -> None:
    assert ours.shape == stock.shape, (what, ours.shape, stock.shape)
    assert ours.dtype == stock.dtype, what
    finite = stock.isfinite()
    assert torch.equal(ours.isfinite(), finite), what
    error = (ours - stock)[finite].abs().max()
    assert error <= 1e-3, (what, error)


def assert_same_steps(ours: Any, stock: Any, name: str, batch: Batch, copies: int = 1, rows_dim: int = 0) -> None:
    """Per step and layer the same tensors; where the first step's queries are padding, anything goes."""
    assert len(ours) == len(stock)
    for step, (our_layers, stock_layers) in enumerate(zip(ours, stock, strict=True)):
        if torch.is_tensor(our_layers):
            assert_close(our_layers, stock_layers, f"{name} of step {step}")
            continue
        assert len(our_layers) == len(stock_layers)
        for layer, (a, b) in enumerate(zip(our_layers, stock_layers, strict=True)):
            assert a.shape == b.shape, (name, step, layer, a.shape, b.shape)
            if step == 0:
                real = batch["attention_mask"].repeat_interleave(copies, 0).bool()
                a, b = (t.movedim(-2, 1)[real] for t in (a, b))
            assert_close(a, b, f"{name} of step {step}, layer {layer}")


RETURNED = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
}


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_returned_scores_and_states(family: str, copies: int, beams: int) -> None:
    stock, model = pair(family)
    batch = padded_batch()
    options: dict[str, Any] = {"num_beams": beams, "num_return_sequences": copies}
    if copies > 1 and beams == 1:
        options |= SAMPLING
    expected = run(stock, batch, 8, **RETURNED, **options)
    result = run(model, batch, 8, **RETURNED, **options)
    assert type(result) is type(expected) and result.keys() == expected.keys()
    assert torch.equal(result.sequences, expected.sequences)
    for name in ("scores", "logits", "hidden_states"):
        assert_same_steps(result[name], expected[name], name, batch, max(copies, beams))
    assert_fast(model, real_tokens(batch), shared=max(copies, beams) > 1, held=None)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("beams", [1, 2])
def test_returned_attentions_fall_back(family: str, beams: int) -> None:
    stock, model = pair(family, attn_implementation="eager")
    batch = padded_batch()
    options = {"output_attentions": True, "num_beams": beams, **RETURNED}
    expected, result = run(stock, batch, 8, **options), run(model, batch, 8, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert len(result.attentions) == 8 and len(result.attentions[0]) == 3
    for name in ("scores", "logits", "hidden_states", "attentions"):
        assert_same_steps(result[name], expected[name], name, batch, beams)
    call = hf_fastattn.report(model).last_call
    assert call.fallbacks and all("attention weights" in reason for reason in call.fallbacks)


def test_eager_model_takes_the_fast_path() -> None:
    stock, model = pair("qwen2_window", attn_implementation="eager")
    batch = padded_batch()
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, real_tokens(batch))


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 3}])
def test_inputs_embeds(family: str, options: dict[str, Any]) -> None:
    stock, model = pair(family)
    if "num_return_sequences" in options:
        options = {**options, **SAMPLING}
    batch = padded_batch()
    embedded = {
        "inputs_embeds": stock.get_input_embeddings()(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
    }
    tokens = assert_same_tokens(stock, model, embedded, 24, **options)
    assert tokens.shape[1] == 24
    assert_fast(model, real_tokens(batch), shared=bool(options))


def test_inputs_embeds_with_ids() -> None:
    stock, model = pair("llama")
    batch = dict(padded_batch())
    batch["inputs_embeds"] = stock.get_input_embeddings()(batch["input_ids"]).detach()
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, real_tokens(batch))


def test_inputs_embeds_that_differ_are_not_taken_for_equal_rows() -> None:
    stock, model = pair("llama")
    embeds = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(3))
    embeds[1, :19] = embeds[0, :19]
    batch = {
        "input_ids": single(20)["input_ids"].repeat(2, 1),
        "attention_mask": torch.ones(2, 20, dtype=torch.long),
        "inputs_embeds": embeds,
    }
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, 40)


@pytest.mark.parametrize("family", CORE)
def test_no_mask_given(family: str) -> None:
    stock, model = pair(family)
    batch = {"input_ids": padded_batch(2)["input_ids"].clamp_min(1)}
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, 74)


@pytest.mark.parametrize("family", CORE)
def test_one_token_prompts(family: str) -> None:
    stock, model = pair(family)
    batch = {"input_ids": torch.tensor([[5], [6]])}
    assert_same_tokens(stock, model, batch, 24)
    assert_fast(model, 2)


@pytest.mark.parametrize("family", CORE)
def test_users_dynamic_cache_falls_back(family: str) -> None:
    stock, model = pair(family)
    theirs, ours = DynamicCache(config=stock.config), DynamicCache(config=model.config)
    expected = run(stock, padded_batch(), 24, past_key_values=theirs)
    tokens = run(model, padded_batch(), 24, past_key_values=ours)
    assert torch.equal(tokens, expected)
    assert ours.get_seq_length() == theirs.get_seq_length() == 60
    call = hf_fastattn.report(model).last_call
    assert call.fallbacks and all("DynamicCache" in reason for reason in call.fallbacks)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_other_caches_run_stock(options: dict[str, Any]) -> None:
    stock, model = pair("llama")
    assert_same_tokens(stock, model, padded_batch(), 12, **options)
    call = hf_fastattn.report(model).last_call
    assert call.fallbacks and call.forwards == 0
    assert_same_tokens(stock, model, padded_batch(), 12)
    assert_fast(model)


def chat(model: Any, cache: Any, rows: int, **kwargs: Any) -> list[torch.Tensor]:
    """Three turns over one cache; from the second turn on rows are padded in the middle."""
    batch = padded_batch(rows)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    turns = []
    for turn in range(3):
        tokens = run(
            model,
            {"input_ids": ids, "attention_mask": mask},
            12,
            past_key_values=cache,
            **kwargs,
        )
        turns.append(tokens)
        message = padded_batch(rows, 11, seed=turn + 2)
        ids = torch.cat([tokens, message["input_ids"]], 1)
        answered = torch.ones(rows, tokens.shape[1] - mask.shape[1], dtype=mask.dtype)
        mask = torch.cat([mask, answered, message["attention_mask"]], 1)
    return turns


@pytest.mark.parametrize("options", [{}, SAMPLING, {"prefill_chunk_size": 5}])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", CORE)
def test_chat_over_a_paged_cache(family: str, rows: int, options: dict[str, Any]) -> None:
    stock, model = pair(family)
    if "prefill_chunk_size" in options and OLD:
        pytest.skip("stock feeds the whole chat again in this version")
    cache = hf_fastattn.PagedCache(model.config)
    expected = chat(stock, DynamicCache(config=stock.config), rows, **options)
    turns = chat(model, cache, rows, **options)
    for ours, theirs in zip(turns, expected, strict=True):
        assert torch.equal(ours, theirs)
    if family == "qwen2_window" and rows > 1:
        # A later turn's padding lies in the middle; stock's windows count it, ours would not.
        fallbacks = hf_fastattn.report(model).last_call.fallbacks
        assert fallbacks and all("holes" in reason for reason in fallbacks)
    else:
        assert_fast(model, held=None)
    assert cache.get_seq_length() == turns[-1].shape[1] - 1
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(chat(model, cache, rows, **options)[0], expected[0])


def test_a_later_turn_computes_only_new_tokens() -> None:
    _, model = pair("llama")
    cache = hf_fastattn.PagedCache(model.config)
    chat(model, cache, 1)
    # The last token of the answer was never fed to the model, so it comes with the new message.
    assert_fast(model, 1 + 11, held=None)


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("copies", [1, 3])
def test_returned_cache_can_be_used_again(family: str, copies: int) -> None:
    stock, model = pair(family)
    options: dict[str, Any] = {"return_dict_in_generate": True, "num_return_sequences": copies}
    if copies > 1:
        options |= SAMPLING
    results = []
    for side in (stock, model):
        first = run(side, padded_batch(2), 12, **options)
        mask = padded_batch(2)["attention_mask"].repeat_interleave(copies, 0)
        ids = torch.cat([first.sequences, first.sequences[:, -5:]], 1)
        mask = torch.cat([mask, torch.ones(2 * copies, 17, dtype=mask.dtype)], 1)
        again = {"input_ids": ids, "attention_mask": mask}
        results.append(run(side, again, 12, past_key_values=first.past_key_values))
        cache = first.past_key_values
    assert torch.equal(results[1], results[0])
    assert isinstance(cache, hf_fastattn.PagedCache)
    assert cache.get_seq_length() == results[1].shape[1] - 1
    assert_fast(model, held=None)
    assert hf_fastattn.report(model).pages_in_use > 0
    del cache, first
    gc.collect()
    assert hf_fastattn.report(model).pages_in_use == 0


def test_two_returned_caches_live_side_by_side() -> None:
    stock, model = pair("llama")
    ids = [single(30, seed)["input_ids"] for seed in (1, 2)]
    results: dict[str, list[torch.Tensor]] = {}
    for name, side in (("stock", stock), ("ours", model)):
        caches = []
        for prompt in ids:
            out = run(side, {"input_ids": prompt}, 8, return_dict_in_generate=True)
            caches.append((out.sequences, out.past_key_values))
        results[name] = [
            run(
                side,
                {"input_ids": torch.cat([text, prompt], 1)},
                12,
                past_key_values=cache,
            )
            for (text, cache), prompt in zip(caches, ids, strict=True)
        ]
    for ours, theirs in zip(results["ours"], results["stock"], strict=True):
        assert torch.equal(ours, theirs)
    assert_fast(model, held=None)


@torch.no_grad()
def manual_loop(model: Any, batch: Batch, cache: Any, steps: int = 12) -> torch.Tensor:
    """A user's own loop over `model(...)`; returns the logits `[steps, rows, vocab]`."""
    ids, mask, logits = batch["input_ids"], batch["attention_mask"], []
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for _ in range(steps):
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits[:, -1])
        ids = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    assert out.past_key_values is cache
    return torch.stack(logits)


@pytest.mark.parametrize("family", CORE)
def test_manual_loop(family: str) -> None:
    stock, model = pair(family)
    cache = hf_fastattn.PagedCache(model.config)
    expected = manual_loop(stock, padded_batch(), DynamicCache(config=stock.config))
    assert_close(manual_loop(model, padded_batch(), cache), expected, "logits")
    assert cache.get_seq_length() == 37 + 11
    assert hf_fastattn.report(model).last_call.fallbacks == {}


@pytest.mark.parametrize("family", CORE)
def test_cache_operations_of_a_manual_loop(family: str) -> None:
    """Crop, reorder, repeat and select between forwards, as stock's cache does."""
    stock, model = pair(family)
    logits = []
    for side, cache in (
        # Without a config it keeps every key, so that stock can crop in all versions.
        (stock, DynamicCache()),
        (model, hf_fastattn.PagedCache(model.config)),
    ):
        if hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        ids = torch.randint(1, VOCAB, (4, 30), generator=torch.Generator().manual_seed(8))
        with torch.no_grad():
            steps = [side(ids[:2, :20], past_key_values=cache).logits]
            cache.batch_repeat_interleave(2)
            steps.append(side(ids[:, 20:24], past_key_values=cache).logits)
            cache.crop(-2)
            cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
            steps.append(side(ids[:, 24:27], past_key_values=cache).logits)
            cache.batch_select_indices(torch.tensor([2, 0]))
            steps.append(side(ids[:2, 27:], past_key_values=cache).logits)
        logits.append(steps)
    for ours, theirs in zip(logits[1], logits[0], strict=True):
        assert_close(ours, theirs, "logits")
    assert hf_fastattn.report(model).last_call.fallbacks == {}


@pytest.mark.parametrize("family", CORE)
def test_forward_without_a_cache(family: str) -> None:
    stock, model = pair(family)
    with torch.no_grad():
        expected = stock(**padded_batch(), use_cache=False)
        ours = model(**padded_batch(), use_cache=False)
        real = padded_batch()["attention_mask"].bool()
        assert_close(ours.logits[real], expected.logits[real], "logits")
        assert ours.past_key_values is None


def test_repeated_calls_reuse_the_pool() -> None:
    stock, model = pair("qwen2_window")
    for seed in range(4):
        batch = padded_batch(2 + seed % 2, 20 + 9 * seed, seed)
        assert_same_tokens(stock, model, batch, 12, num_beams=1 + seed % 3)
        assert_fast(model, real_tokens(batch))


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("rows", [1, 3])
def test_copies_of_a_filled_cache(family: str, rows: int) -> None:
    """A system prompt computed once, its cache copied for each question, as Transformers' guide does it."""
    stock, model = pair(family)
    answers: list[list[torch.Tensor]] = []
    for side, cache in (
        (stock, DynamicCache(config=stock.config)),
        (model, hf_fastattn.PagedCache(model.config)),
    ):
        system = padded_batch(rows)
        with torch.no_grad():
            side(**system, past_key_values=cache)
        answers.append([])
        for seed in (3, 4):
            question = padded_batch(1, 11, seed)["input_ids"].expand(rows, -1)
            batch = {
                "input_ids": torch.cat([system["input_ids"], question], 1),
                "attention_mask": torch.cat([system["attention_mask"], torch.ones_like(question)], 1),
            }
            answers[-1].append(run(side, batch, 20, past_key_values=copy.deepcopy(cache)))
        assert cache.get_seq_length() == 37
    for ours, theirs in zip(answers[1], answers[0], strict=True):
        assert torch.equal(ours, theirs)
    call = assert_fast(model, 11 * rows, held=None)
    assert call.forwards == 20


@pytest.mark.parametrize("family", CORE)
def test_fallback_in_the_middle(family: str) -> None:
    """Attentions asked for between two forwards on pages: the cache serves both ways, padding included."""
    stock, model = pair(family, attn_implementation="eager")
    batch = padded_batch()
    more = torch.randint(1, VOCAB, (3, 8), generator=torch.Generator().manual_seed(6))
    found = []
    for side, cache in (
        (stock, DynamicCache(config=stock.config)),
        (model, hf_fastattn.PagedCache(model.config)),
    ):
        mask, steps = batch["attention_mask"], []
        with torch.no_grad():
            side(**batch, past_key_values=cache)
            for lo, hi, asked in (
                (0, 1, False),
                (1, 2, True),
                (2, 5, True),
                (5, 6, False),
                (6, 8, False),
            ):
                mask = torch.cat([mask, mask.new_ones(3, hi - lo)], 1)
                out = side(
                    more[:, lo:hi],
                    attention_mask=mask,
                    position_ids=(mask.cumsum(-1) - 1)[:, lo - hi :],
                    past_key_values=cache,
                    output_attentions=asked,
                )
                steps.append(out.logits)
                if asked:
                    steps.extend(out.attentions)
        found.append(steps)
    assert len(found[1]) == len(found[0]) == 5 + 2 * 3
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert_close(ours, theirs, "logits or attentions")
    assert_fast(model, held=None, fallbacks=("attention weights",))


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_unpatched_model_with_a_paged_cache(family: str, options: dict[str, Any]) -> None:
    stock = tiny(family)
    batch = single() if "prompt_lookup_num_tokens" in options else padded_batch()
    cache = hf_fastattn.PagedCache(stock.config)
    tokens = run(stock, batch, 24, past_key_values=cache, **options)
    if "prompt_lookup_num_tokens" in options:
        options = {}
    assert torch.equal(tokens, run(stock, batch, 24, **options))
    assert cache.groups.pages_in_use > 0


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
