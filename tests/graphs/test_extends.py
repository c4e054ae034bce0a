"""Forwards of several tokens a row from graphs: prompts, chat turns, drafts; with room for more tokens than there are.

On the CPU nothing is recorded: forwards run again over their static tensors (`reexecuted`).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs import forward_graphs
from hf_fastattn.graphs.recorded_forward import RecordedForward
from hf_fastattn.graphs.static_inputs import FEWEST_CAPTURED, MOST_CAPTURED, StaticInputs, bucket_of_tokens, most_tokens
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import (
    CORE,
    FAMILIES,
    VOCAB,
    assert_fast,
    image_batch,
    noisy,
    padded_batch,
    pair_with_graphs,
    patch_with_graphs,
    single,
    tiny,
)
from tests.tools.reexecuted import ReexecutedStep, reexecuted

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
NOT_CAPTURED = ("next", "qwen3_5")


@pytest.fixture(autouse=True, params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param


def both(family: str, device: str, **over: Any) -> list[Any]:
    return [model.to(device) for model in pair_with_graphs(family, **over)]


def run(model: Any, new: int = 5, **kwargs: Any) -> Any:
    given = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    moved = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    return model.generate(**moved)


def appends(model: Any) -> tuple[int, int]:
    """Captured and replayed in the last call."""
    call = hf_fastattn.report(model).last_call
    return call.appends_captured, call.appends_replayed


def test_buckets() -> None:
    buckets = [bucket_of_tokens(tokens) for tokens in range(1, MOST_CAPTURED + 1)]
    assert all(bucket >= tokens for tokens, bucket in enumerate(buckets, 1)) and buckets == sorted(buckets)
    assert all(bucket <= tokens + tokens // 8 for tokens, bucket in enumerate(buckets, 1) if tokens > 1024)
    assert len(set(buckets)) <= 48 and bucket_of_tokens(MOST_CAPTURED) == MOST_CAPTURED


def test_small_models_have_larger_forwards_captured() -> None:
    def of(hidden: int, dtype: torch.dtype) -> int:
        with torch.device("meta"):
            model = tiny("llama", hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2)
        return most_tokens(model.to(dtype).model)

    assert of(64, torch.bfloat16) == MOST_CAPTURED and of(4096, torch.bfloat16) == FEWEST_CAPTURED
    assert FEWEST_CAPTURED < of(1024, torch.bfloat16) < MOST_CAPTURED and of(1024, torch.float32) == FEWEST_CAPTURED


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts(family: str, device: str) -> None:
    stock, model = both(family, device)
    captured = not any(part in family for part in NOT_CAPTURED)
    # The first call makes the pages, the second is the first of its shape that can be captured.
    for number, seed in enumerate((1, 2, 3)):
        batch = padded_batch(3, 37, seed)
        assert torch.equal(run(model, **batch), run(stock, **batch))
        assert_fast(model)
        done = {0: (0, 0), 1: (1, 1)}.get(number, (0, 1)) if captured else (0, 0)
        assert appends(model) == done, number


@pytest.mark.parametrize("family", CORE)
def test_prompts_of_other_lengths_in_the_same_bucket(family: str, device: str) -> None:
    stock, model = both(family, device)
    for length in (64, 64, 49, 63, 50, 64):
        batch = single(length, seed=length)
        assert torch.equal(run(model, **batch), run(stock, **batch)), length
    assert appends(model) == (0, 1)
    for shape in ((2, 30), (2, 33), (3, 21), (1, 5), (1, 64)):
        batch = padded_batch(*shape)
        assert torch.equal(run(model, **batch), run(stock, **batch)), shape


@pytest.mark.parametrize("family", CORE)
def test_chat_turns(family: str, device: str) -> None:
    stock, model = both(family, device)
    replayed = 0
    for _ in range(3):
        answers = []
        for candidate in (stock, model):
            result = run(candidate, 4, **single(9), return_dict_in_generate=True)
            for turn in range(3):
                ids = torch.cat((result.sequences, single(6, seed=turn)["input_ids"].to(device)), 1)
                held = {CACHE: result[CACHE], "return_dict_in_generate": True}
                result = run(candidate, 4, input_ids=ids, attention_mask=torch.ones_like(ids), **held)
                replayed += appends(candidate)[1] if candidate is model else 0
            answers.append(result.sequences)
        assert torch.equal(*answers)
        del result, held
        gc.collect()
    assert replayed >= 6 and hf_fastattn.report(model).pages_in_use == 0


@pytest.mark.parametrize("family", CORE)
def test_drafts(family: str, device: str) -> None:
    stock, model = both(family, device)
    repeated = {"input_ids": single(12)["input_ids"].repeat(1, 3), "attention_mask": torch.ones(1, 36, dtype=torch.long)}
    assert torch.equal(run(model, 40, prompt_lookup_num_tokens=4, **repeated), run(stock, 40, **repeated))
    assert appends(model)[1] > 0
    assert torch.equal(run(model, 40, assistant_early_exit=1, **repeated), run(stock, 40, **repeated))
    assert appends(model)[1] > 0
    assistant = patch_with_graphs(noisy(tiny(family)).to(device))
    want = run(stock, 40, **single())
    for _ in range(2):
        assert torch.equal(run(model, 40, assistant_model=assistant, **single()), want)
    assert appends(model)[1] > 4


def test_samples_of_one_prompt(device: str) -> None:
    _, model = both("llama", device)
    for number in range(3):
        call = {"do_sample": True, "temperature": 2.0, "num_return_sequences": 6}
        assert run(model, 20, **call, **single(33, seed=number)).shape == (6, 53)
        assert_fast(model, shared=True, prompt_tokens=33)
    assert appends(model) == (0, 1)


def test_images_and_embeddings(device: str) -> None:
    stock, model = both("qwen2_vl", device)
    batch = image_batch()
    for _ in range(3):
        assert torch.equal(run(model, **batch), run(stock, **batch))
    stock, model = both("llama", device)
    for seed in (1, 2, 3):
        ids = single(20, seed)["input_ids"].to(device)
        embeds = stock.get_input_embeddings()(ids).detach()
        assert torch.equal(run(model, inputs_embeds=embeds), run(stock, inputs_embeds=embeds))
    assert appends(model) == (0, 1)


def test_the_same_bits_before_and_after_a_capture(device: str) -> None:
    _, model = both("llama", device)
    model.to(torch.bfloat16)
    ids = single(37)["input_ids"].to(device)
    logits = []
    with torch.no_grad():
        for _ in range(5):
            logits.append(model(ids, **{CACHE: hf_fastattn.PagedCache(model.config, groups=model._fastattn.runtime.groups)}))
    assert all(torch.equal(logits[0].logits, other.logits) for other in logits)
    assert not logits[0].logits.isnan().any() and logits[0].logits.shape == (1, 37, VOCAB)


def test_what_is_not_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = both("llama", device)
    monkeypatch.setattr(forward_graphs, "is_captured", lambda decoder, tokens: tokens <= 64)
    long = single(65)
    for _ in range(3):
        assert torch.equal(run(model, 2, **long), run(stock, 2, **long))
        assert appends(model) == (0, 0)
    monkeypatch.undo()
    hidden = {"output_hidden_states": True, "return_dict_in_generate": True}
    for _ in range(3):
        assert torch.equal(run(model, **single(), **hidden).sequences, run(stock, **single(), **hidden).sequences)
        assert appends(model) == (0, 0)
    off = pair_with_graphs("llama", {"cuda_graphs": False})[1].to(device)
    for _ in range(3):
        run(off, **single())
        assert appends(off) == (0, 0)


def test_steps_of_many_rows_are_captured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "is_captured", lambda decoder, tokens: tokens <= 2)
    stock, model = both("llama", device)
    batch = {**padded_batch(3), "num_beams": 2}
    for _ in range(3):
        assert torch.equal(run(model, 8, **batch), run(stock, 8, **batch))
    assert appends(model) == (0, 0) and hf_fastattn.report(model).last_call.graphs_replayed == 7


def test_a_changed_weight_is_captured_anew(device: str) -> None:
    stock, model = both("llama", device)
    for _ in range(3):
        run(model, **single())
    for candidate in (stock, model):
        layer = candidate.model.layers[1].mlp.down_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)
    for done in ((1, 1), (0, 1)):
        assert torch.equal(run(model, **single()), run(stock, **single()))
        assert appends(model) == done


def test_the_least_recently_used_goes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_graphs, "MAX_EXTENDS", 2)
    stock, model = both("llama", device)
    for length in (9, 20, 40, 60, 60, 40, 20, 9, 40, 60, 60):
        batch = single(length)
        assert torch.equal(run(model, **batch), run(stock, **batch))
        assert len(model._fastattn.runtime.graphs) <= 2 + forward_graphs.MAX_GRAPHS
    assert appends(model) == (0, 1)


def test_a_capture_that_fails(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = both("llama", device)
    run(model, **single())
    kind = ReexecutedStep if device == "cpu" else RecordedForward

    def failing(*args: Any) -> None:
        raise RuntimeError("no capture today")

    monkeypatch.setattr(kind, "capture", failing)
    for _ in range(3):
        assert torch.equal(run(model, 3, num_beams=2, **single()), run(stock, 3, num_beams=2, **single()))
        assert appends(model) == (0, 0)
        assert any("no capture today" in reason for reason in assert_fast(model).uncaptured)


def test_a_fault_changes_tokens(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one place off: what the tests above compare does depend on the static inputs."""
    stock, model = both("llama", device)
    write = StaticInputs._write_tokens

    def shifted(self: StaticInputs, *args: Any) -> None:
        write(self, *args)
        if self.shape.bucket is not None:
            self.tokens[0, :20].copy_(self.tokens[0, 1:21].clone())

    monkeypatch.setattr(StaticInputs, "_write_tokens", shifted)
    batch = padded_batch(2, 37)
    assert not torch.equal(run(model, 20, **batch), run(stock, 20, **batch))


def test_prompts_of_rollouts_that_leave_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where graphs go back after each call in train mode, prompts are recorded once at most; in eval mode again."""
    limit = "hf_fastattn.runtime.KEPT_IN_TRAINING"
    stock, model = both("llama", device)
    batch, seen = padded_batch(), []
    for training, small in zip([True] * 5 + [False] * 2, [True] * 2 + [False] * 2 + [True] * 3, strict=True):
        monkeypatch.setattr(limit, 2**30 if small else 0)
        for each in (stock, model):
            each.train(training)
        with torch.no_grad():
            assert torch.equal(run(model, **batch), run(stock, **batch))
        seen.append(appends(model))
    assert seen == [(0, 0), (1, 1), (0, 1), (0, 0), (0, 0), (0, 0), (1, 1)]
