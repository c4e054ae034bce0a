"""Pages of earlier calls and rows in the device's loop. On the CPU its steps run again over their static tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.cache import prefix_groups
from hf_fastattn.eval.accuracy import reexecuted
from hf_fastattn.generation import prefix_call
from hf_fastattn.loop.decode_loop import DecodeLoop
from tests.generation.calls import assert_same_tokens
from tests.generation.test_prefix_rows import left_padded, questions
from tests.loop.test_decode_loop import ENDS
from tests.tools.models import assert_fast, padded_batch, pair_with_graphs, single

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
KEPT = {"prefix_cache": True}


@pytest.fixture(autouse=True, params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted.reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def anything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_groups, "WORTH_BYTES", 1)
    monkeypatch.setattr(prefix_call, "WORTH_A_TURN", prefix_call.WORTH_ON_CPU)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """In which the rows of a call went on."""
    seen: list[list[int]] = []
    arrange = DecodeLoop._arrange
    monkeypatch.setattr(DecodeLoop, "_arrange", lambda self, order: (seen.append(order), arrange(self, order)))
    return seen


def moved(device: str, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return pair[0].to(device), pair[1].to(device)


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def assert_looped(model: Any) -> Any:
    """The last call ran on the device, all its steps were replayed; returns its counters."""
    call = assert_fast(model, held=None)
    assert call.fast_loops == 1 and not call.uncaptured
    assert call.graphs_replayed > 0
    return call


def test_turns(device: str) -> None:
    stock, model = moved(device, pair_with_graphs("llama", KEPT))
    batch, known = single(50), 0
    for _ in range(4):
        ids = assert_same_tokens(stock, model, on(device, batch), 20)
        call = assert_looped(model)
        assert (call.prompt_tokens, call.tokens_reused) == (batch["input_ids"].shape[1] - known, known)
        known = ids.shape[1] - 1
        ids = torch.cat((ids.cpu(), torch.tensor([[3, 1, 4, 1, 5]])), 1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_rows_that_ended_before_others_stay(device: str) -> None:
    stock, model = moved(device, pair_with_graphs("llama", KEPT))
    batch = on(device, padded_batch(3, 60))
    tokens = assert_same_tokens(stock, model, batch, 40, eos_token_id=ENDS)
    assert_looped(model)
    again = torch.cat((tokens, torch.full((3, 1), 9, device=device)), 1)
    new = tokens[:, 60:]
    ends = torch.isin(new, torch.tensor(ENDS, device=device))
    length = torch.where(ends.any(1), ends.int().argmax(1), new.shape[1] - 1)
    # As a chat would: without the padding behind a row's end.
    for row in range(3):
        held = int(batch["attention_mask"][row].sum()) + int(length[row])
        ids = again[row : row + 1, : 60 + int(length[row]) + 1][:, int((batch["attention_mask"][row] == 0).sum()) :]
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert_same_tokens(stock, model, one, 5)
        assert hf_fastattn.report(model).last_call.tokens_reused == (held if held >= 16 else 0)


def test_rows_that_are_no_neighbours_are_read_together(device: str, orders: list[list[int]]) -> None:
    stock, model = moved(device, pair_with_graphs("llama"))
    rows = [row for both in zip(questions(3, seed=1), questions(3, 70, seed=2), strict=True) for row in both]
    assert_same_tokens(stock, model, on(device, left_padded(rows)), 24)
    assert_looped(model)
    assert [sorted(order) for order in orders] == [list(range(6))]
    assert [sorted(row % 2 for row in order[:3]) in ([0] * 3, [1] * 3) for order in orders] == [True]
    assert_same_tokens(stock, model, on(device, left_padded(rows)), 24, eos_token_id=ENDS)
    assert_looped(model)
    assert len(orders) == 2


def test_the_returned_cache_is_in_the_rows_order(device: str, orders: list[list[int]]) -> None:
    stock, model = moved(device, pair_with_graphs("llama"))
    rows = [row for both in zip(questions(2, seed=1), questions(2, 70, seed=2), strict=True) for row in both]
    batch = on(device, left_padded(rows))
    outputs = [
        one.generate(**batch, max_new_tokens=9, do_sample=False, return_dict_in_generate=True) for one in (stock, model)
    ]
    assert len(orders) == 1
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    shown = torch.nn.functional.pad(batch["attention_mask"], (0, 8), value=1).bool()
    caches = [getattr(one, "cache", None) or one.past_key_values for one in outputs]
    for layer, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.allclose(layer.keys.transpose(1, 2)[shown], other.keys.transpose(1, 2)[shown], atol=1e-4)


def test_draws_depend_on_the_row_and_not_on_its_place(device: str, orders: list[list[int]]) -> None:
    shared, apart = (moved(device, pair_with_graphs("llama"))[1] for _ in range(2))
    apart._fastattn.runtime.shares_rows = False
    rows = [row for both in zip(questions(3, seed=1), questions(3, 70, seed=2), strict=True) for row in both]
    batch = on(device, left_padded(rows))
    for seed in range(5):
        found = []
        for model in (shared, apart):
            torch.manual_seed(seed)
            found.append(model.generate(**batch, max_new_tokens=16, do_sample=True, temperature=3.0, eos_token_id=ENDS))
        assert torch.equal(*found)
        # Rows of the same prompt draw for themselves; two may still end at once with the same token.
        assert len({tuple(row.tolist()) for row in found[0][:, -16:]}) >= 4
        assert assert_looped(apart).tokens_reused == 0 < assert_looped(shared).tokens_reused
    assert len(orders) == 5
