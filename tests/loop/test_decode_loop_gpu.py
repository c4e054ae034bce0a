"""What only a GPU shows of the fast loop: nobody waits, draws follow stock's distribution, and nothing grows with calls."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs import forward_graphs
from hf_fastattn.loop import decode_loop, loop_graphs
from hf_fastattn.pages.page_pool import PagePool
from tests.tools.models import VOCAB, padded_batch, pair_with_graphs, patch_with_graphs, single, tiny

pytestmark = pytest.mark.gpu

OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"eos_token_id": [3, 4, 5]},
    {"do_sample": True, "top_k": 5},
    {"repetition_penalty": 1.1},
    {"num_beams": 2},
    {"num_beams": 2, "do_sample": True},
]
# Ten thousand are run before a release: some minutes.
CALLS = int(os.environ.get("HF_FASTATTN_CALLS", "300"))


def run(model: Any, new: int = 40, **kwargs: Any) -> torch.Tensor:
    given = {**padded_batch(), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    given = {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    return model.generate(**given)


@contextmanager
def sync_debug_mode(mode: str | int) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def strictly(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Waiting for the device is an error in these methods of the loop, but where tests write NaN to pages released."""
    for name in names:
        original = getattr(decode_loop.DecodeLoop, name)

        def strict(self: Any, *args: Any, original: Any = original) -> Any:
            with sync_debug_mode("error"):
                return original(self, *args)

        monkeypatch.setattr(decode_loop.DecodeLoop, name, strict)
    # The pool itself knows no tensors: what waits in it is the fixture.
    release = PagePool.release

    def may_wait(self: PagePool, pages: Iterable[int]) -> None:
        with sync_debug_mode("default"):
            release(self, pages)

    monkeypatch.setattr(PagePool, "release", may_wait)


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 9, "top_p": 0.9},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[3], [4, 5, 6]], "suppress_tokens": [7], "begin_suppress_tokens": [8]},
        {"sequence_bias": [[[9], 2.0]], "forced_eos_token_id": 5, "remove_invalid_values": True, "renormalize_logits": True},
        {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    ],
)
def test_the_host_never_waits_for_a_step(rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "WORTH_CAPTURING", 1)
    _, model = pair_with_graphs("qwen2_window")
    model.to("cuda")
    model._fastattn.runtime.row_limits = [40, *range(8, 4 * rows + 4, 4)]
    run(model, **padded_batch(rows), **options)
    strictly(monkeypatch, "_launch", "_take", "_release_finished", "_reserve", "_compact")
    run(model, **padded_batch(rows), **options)
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and call.graphs_replayed == 39 and call.graphs_captured == 0


@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_k": 12}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.8, "repetition_penalty": 1.5},
        {"typical_p": 0.7}, {"top_k": 20, "typical_p": 0.5}, {"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.02},
        {"suppress_tokens": [*range(40)]},
    ],
)  # fmt: skip
def test_draws_follow_stocks_distribution(options: dict[str, Any]) -> None:
    stock, model = (model.to("cuda") for model in pair_with_graphs("llama"))
    draws, rows, temperature = 4096, 256, 6.0
    prompt = single()["input_ids"].to("cuda")
    # The second new token is drawn inside a graph; the first is the same in all rows.
    ask = {"do_sample": True, "temperature": temperature, "top_k": 0, **options, "pad_token_id": 0}
    torch.manual_seed(3)
    chunks = [model.generate(prompt.expand(rows, -1), max_new_tokens=2, **ask)[:, -2:].cpu() for _ in range(draws // rows)]
    assert hf_fastattn.report(model).last_call.graphs_replayed == 1
    drawn = torch.cat(chunks)
    first = int(drawn[:, 0].mode().values)
    seconds = drawn[drawn[:, 0] == first, 1]
    given = torch.cat((prompt, torch.full((1, 1), first, device="cuda")), 1)
    scores = stock.generate(given, max_new_tokens=1, return_dict_in_generate=True, output_scores=True, **ask).scores[0][0]
    expected = scores.softmax(-1).double().cpu() * len(seconds)
    counts = torch.bincount(seconds, minlength=VOCAB).double()
    assert not counts[expected == 0].any()
    # Cells that are expected too rarely are counted as one.
    common = expected >= 5
    cells = [(counts[common], expected[common]), (counts[~common].sum(), expected[~common].sum().clamp(min=1.0))]
    statistic = sum(float(((seen - due) ** 2 / due).sum()) for seen, due in cells)
    freedom = int(common.sum())
    # Six standard deviations of a chi-square variable.
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6


def test_memory_does_not_grow_with_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    # Twelve steps of three sizes come up, and three sizes of drawn beams, whose loop is Transformers': few kernels to
    # compile, and old graphs have to go.
    monkeypatch.setattr(loop_graphs, "MAX_GRAPHS", 6)
    monkeypatch.setattr(forward_graphs, "MAX_GRAPHS", 2)
    monkeypatch.setattr(forward_graphs, "MAX_EXTENDS", 2)
    model = patch_with_graphs(tiny("llama", num_hidden_layers=2).to("cuda"))
    runtime, source = model._fastattn.runtime, random.Random(1)
    levels = []
    for number in range(CALLS):
        batch = padded_batch(source.choice([1, 1, 2, 5]), source.randint(60, 90))
        run(model, source.randint(1, 5), **batch, **source.choice(OPTIONS))
        assert runtime.groups.pages_in_use == 0
        assert len(runtime.loop_graphs) <= 6 and len(runtime.graphs) <= 4
        if number % (CALLS // 4) == CALLS // 4 - 1:
            gc.collect()
            torch.cuda.synchronize()
            # Pages grow with what was held at once, and are counted elsewhere.
            levels.append(torch.cuda.memory_allocated() - hf_fastattn.report(model).page_bytes_allocated)
    assert len(runtime.loop_graphs) == 6 and len(runtime.graphs) == 4
    # All shapes have come up in the first quarter.
    assert max(levels) <= levels[0] + 2**20, levels


def test_a_smaller_batch_goes_on_as_it_would_have() -> None:
    stock, model = (model.to("cuda") for model in pair_with_graphs("llama"))
    rows = 48
    batch = padded_batch(rows, 60)
    want = run(stock, 200, **batch)
    lengths = [max(2, 200 * (row + 1) // rows) for row in range(rows)]
    for row, length in enumerate(lengths):
        want[row, 60 + length :] = 0
    model._fastattn.runtime.row_limits = lengths
    assert torch.equal(run(model, 200, **batch), want)
    assert hf_fastattn.report(model).last_call.graphs_captured > 1
