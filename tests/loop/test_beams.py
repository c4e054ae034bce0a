"""Beams in the device's loop: stock's sequences, whatever ends them, and every page given back.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.tools.models import CORE, assert_fast, padded_batch, pair_with_graphs, real_tokens
from tests.tools.reexecuted import reexecuted_loop

NEW = 40
# Enough of them that beams end at different steps.
ENDS = list(range(3, 128, 9))


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param


def run(model: Any, new: int = NEW, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    given = {**padded_batch(), "max_new_tokens": new, "do_sample": False, "num_beams": 4, "pad_token_id": 0, **kwargs}
    given = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    result = model.generate(**given)
    return result.cpu() if isinstance(result, torch.Tensor) else result


def both(family: str, device: str, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    stock, model = pair_with_graphs(family, options)
    return stock.to(device), model.to(device)


def assert_looped(model: Any) -> Any:
    """The last call ran on the device, from replays alone; returns its counters."""
    call = assert_fast(model)
    assert call.fast_loops == 1 and not call.uncaptured and not call.not_looped
    assert call.graphs_replayed == call.forwards - 1
    return call


@pytest.mark.parametrize("family", [*CORE, "qwen3", "ministral"])
def test_sequences_equal_stock(device: str, family: str) -> None:
    stock, model = both(family, device)
    for new in (1, 2, 17, NEW):
        assert torch.equal(run(model, new), run(stock, new)), new
        call = assert_looped(model)
        assert call.forwards == new and call.prompt_tokens == real_tokens(padded_batch())
    # The same steps serve the second call.
    assert torch.equal(run(model), run(stock)) and assert_looped(model).graphs_captured == 0


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -1.0, 0.6])
def test_ends(device: str, early: bool | str, penalty: float) -> None:
    stock, model = both("qwen2", device)
    for ends in (ENDS, ENDS[:3], ENDS[4]):
        kwargs = {"eos_token_id": ends, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": 3}
        assert torch.equal(run(model, **kwargs), run(stock, **kwargs)), ends
        assert_looped(model)
