"""Hybrids in the device's loop: states of linear attention in slots, stock's tokens, and a cache as stock would leave it.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_fastattn import PagedCache
from hf_fastattn.graphs import forward_graphs
from hf_fastattn.loop import decode_loop
from hf_fastattn.loop.readback import Readback
from hf_fastattn.transformers_version import CACHE
from tests.loop.test_decode_loop import ENDS, Collect, assert_looped, run
from tests.tools.models import assert_fast, padded_batch, pair_with_graphs, real_tokens, single
from tests.tools.reexecuted import reexecuted_loop

HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
NEW = 14
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one row": single(),
    "one token": {"input_ids": torch.tensor([[5]]), "attention_mask": None},
    "ends": {"eos_token_id": ENDS},
    "penalised": {"repetition_penalty": 1.4, "eos_token_id": ENDS[:3]},
    "likeliest samples of one prompt": {**single(), "do_sample": True, "top_k": 1, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams that end": {"num_beams": 4, "eos_token_id": ENDS},
}


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param


def both(family: str, device: str, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    stock, model = pair_with_graphs(family, options)
    return stock.to(device), model.to(device)


@pytest.mark.parametrize("family", HYBRIDS)
def test_tokens_equal_stock(device: str, family: str) -> None:
    stock, model = both(family, device)
    for call, kwargs in CALLS.items():
        assert torch.equal(run(model, NEW, **kwargs), run(stock, NEW, **kwargs)), call
        counters = assert_looped(model)
        if call == "greedy":
            assert counters.prompt_tokens == real_tokens(padded_batch())
            # The same step serves the second call.
            assert torch.equal(run(model, NEW), run(stock, NEW)) and assert_looped(model).graphs_captured == 0


@pytest.mark.parametrize("family", HYBRIDS)
def test_transformers_draws(device: str, family: str) -> None:
    stock, model = both(family, device, {"sampling": "transformers"})
    for kwargs in ({}, {**single(), "num_return_sequences": 3}):
        given = {"do_sample": True, "temperature": 2.0, **kwargs}
        assert torch.equal(run(model, NEW, **given), run(stock, NEW, **given))
        assert_fast(model)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps have chosen arrives no sooner than the host waits for it, as on a GPU that is busy."""
    receive = Readback.receive
    monkeypatch.setattr(Readback, "receive", lambda self, wait: receive(self, wait) if wait else None)


def chat(model: Any, cache: Any, **kwargs: Any) -> list[torch.Tensor]:
    """Three turns over one cache, each of whose prompts begins with all that was said."""
    said, parts = padded_batch(2)["input_ids"][:, -20:], []
    for turn in range(3):
        said = run(model, 9, input_ids=said, attention_mask=None, **{CACHE: cache}, **kwargs)
        parts.append(said)
        more = torch.randint(1, 128, (2, 3 + turn), generator=torch.Generator().manual_seed(turn))
        said = torch.cat((said, more), 1)
    return parts


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("ends", [None, ENDS])
def test_turns_of_a_chat(device: str, late: None, family: str, ends: list[int] | None) -> None:
    stock, model = both(family, device)
    want = chat(stock, DynamicCache(config=stock.config), eos_token_id=ends)
    for cache in (PagedCache(model.config), DynamicCache(config=stock.config)):
        for ours, theirs in zip(chat(model, cache, eos_token_id=ends), want, strict=True):
            assert torch.equal(ours, theirs)
        assert_looped(model, held=None)
        cache.reset()


@pytest.mark.parametrize("new", [1, 2, 9])
def test_a_returned_cache_goes_on_as_stocks(device: str, late: None, new: int) -> None:
    stock, model = both("qwen3_5", device)
    logits = []
    for side in (stock, model):
        out = run(side, new, return_dict_in_generate=True, eos_token_id=ENDS)
        with torch.no_grad():
            mask = torch.cat((padded_batch()["attention_mask"], torch.ones(3, out.sequences.shape[1] - 37)), 1).long()
            last = out.sequences[:, -1:].to(device)
            positions = (mask.cumsum(1) - 1)[:, -1:].to(device)
            after = side(last, attention_mask=mask.to(device), position_ids=positions, **{CACHE: out[CACHE]})
            logits.append((out.sequences.cpu(), after.logits.cpu()))
    assert torch.equal(logits[1][0], logits[0][0])
    torch.testing.assert_close(logits[1][1], logits[0][1], rtol=1e-3, atol=1e-3)


def test_an_interrupted_call_leaves_a_cache_that_goes_on(device: str, late: None) -> None:
    """What the cache counts is what the states know of."""
    stock, model = both("qwen3_5", device)
    cache, prompt = PagedCache(model.config), padded_batch(1)["input_ids"]
    with pytest.raises(KeyboardInterrupt):
        run(model, 30, input_ids=prompt, attention_mask=None, streamer=Collect(fail_at=6), **{CACHE: cache})
    held = cache.get_seq_length()
    whole = run(stock, 30, input_ids=prompt, attention_mask=None)
    assert prompt.shape[1] + 4 <= held < whole.shape[1]
    with torch.no_grad():
        ours = model(whole[:, held : held + 1].to(device), **{CACHE: cache}).logits[:, -1].cpu()
        theirs = stock(whole[:, : held + 1].to(device)).logits[:, -1].cpu()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_that_end_leave_the_batch(device: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "WORTH_CAPTURING", 1)
    stock, model = both(family, device)
    batch = padded_batch(9, 21)
    want = run(stock, 20, **batch)
    lengths = [5, 20, 3, 17, 9, 20, 11, 2, 2]
    for row, length in enumerate(lengths):
        want[row, 21 + length :] = 0
    model._fastattn.runtime.row_limits = lengths
    assert torch.equal(run(model, 20, **batch), want)
    assert_looped(model)


def test_hooks_keep_transformers_own_loop(device: str) -> None:
    stock, model = both("qwen3_5", device)
    module = model.model.language_model.layers[0].linear_attn
    seen: list[int] = []
    handle = module.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(run(model, 6, **single()), run(stock, 6, **single())) and len(seen) == 6
    assert not assert_fast(model).fast_loops
    handle.remove()
    assert torch.equal(run(model, 6, **single()), run(stock, 6, **single())) and assert_looped(model)


def test_memory_of_states_is_given_back(device: str) -> None:
    """Without memory to keep, slots go with the pages."""
    stock, model = both("qwen3_next", device, {"keep_memory": 0.0})
    assert torch.equal(run(model, 6), run(stock, 6)) and assert_looped(model)
    assert model._fastattn.runtime.loop_graphs.row_states is None
    del stock


@pytest.mark.parametrize("large", [0, 2**27])
def test_large_states_are_not_kept_for_two_loops(device: str, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    """Those of steps in Transformers' own loop go when the device's loop takes states, and are made anew."""
    monkeypatch.setattr(forward_graphs, "LARGE_STATES", large)
    stock, model = both("qwen3_next", device)
    for _ in range(2):
        own = {"logits_processor": [lambda ids, scores: scores.roll(1, 1)]}
        assert torch.equal(run(model, 6, **own), run(stock, 6, **own)) and assert_fast(model).graphs_replayed
        assert model._fastattn.runtime.graphs.nbytes
        assert torch.equal(run(model, 6), run(stock, 6)) and assert_looped(model)
        assert (model._fastattn.runtime.graphs._states is None) == (large == 0)


@pytest.mark.parametrize("targets", [["in_proj_qkv", "in_proj_z", "out_proj"], ["in_proj_a", "q_proj", "down_proj"]])
def test_adapters(device: str, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    stock, model = both("qwen3_5", device)
    sides = []
    for side in (stock, model):
        torch.manual_seed(3)
        sides.append(peft.get_peft_model(side, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)))
    assert torch.equal(run(sides[1], 8), run(sides[0], 8))
    assert_looped(model)
