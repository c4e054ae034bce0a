"""Tokens of a model with a variant are those of a stock model whose attention was written for it, in every kind of call.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_fastattn.cache import prefix_groups
from tests.tools import variant_models
from tests.tools.combinations import rest_on_a_gpu
from tests.tools.models import assert_fast, padded_batch, real_tokens
from tests.tools.reexecuted import reexecuted_loop
from tests.tools.variant_models import CASES, patched_with, stock_with

NEW = 14
SMALL = {"num_hidden_layers": 2}
SAMPLED = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "samples": SAMPLED,
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 7},
    "ends": {"eos_token_id": list(range(3, 128, 9))},
}
# A chunk of a prompt sees no key of the next one, in stock as here; the others see whole prompts.
SKIPPED = {("prefix-LM", "chunked")}


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in vars(variant_models).items():
        if isinstance(value, torch.Tensor):
            monkeypatch.setattr(variant_models, name, value.to(request.param))
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def any_shared_prefix_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_groups, "WORTH_BYTES", 1)


def run(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    given = {**batch, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    given = {name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    return model.generate(**given).cpu()


# On the CPU prompts and steps of every variant, alone and with pages in common; of the other calls one in turn.
OTHERS = ("beams", "chunked", "ends")
CELLS = [(name, call) for number, name in enumerate(CASES) for call in ("greedy", "samples", OTHERS[number % 3])]


@pytest.mark.parametrize(("name", "call"), rest_on_a_gpu(CELLS, [(name, call) for name in CASES for call in CALLS]))
def test_tokens(name: str, call: str, device: str) -> None:
    if (name, call) in SKIPPED:
        pytest.skip("chunks see no later ones")
    stock, model = stock_with(name, device, **SMALL), patched_with(name, device, **SMALL)
    want, repeats = run(stock, padded_batch(), **CALLS[call]), call in ("samples", "beams")
    # The second call replays what the first has recorded, prompts included.
    for _ in range(2):
        assert torch.equal(run(model, padded_batch(), **CALLS[call]), want)
        unshared = () if CASES[name].shares or not repeats else ("equal rows",)
        counters = assert_fast(model, fallbacks=unshared)
        assert counters.fast_loops == 1 and counters.graphs_replayed > 0
        if repeats:
            assert (counters.prompt_tokens == real_tokens(padded_batch())) == CASES[name].shares
