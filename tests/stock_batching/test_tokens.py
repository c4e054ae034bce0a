"""Tokens of Transformers' continuous batching on our attention are those of stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import continuous_api

from hf_fastattn.interface import counters
from tests.stock_batching.served import alone, assert_in_place, batched, batching, pair, prompts

# What stock serves with sdpa; it refuses a softcap, and sinks.
ON_SDPA = ("llama", "phi3", "olmo2", "qwen3", "qwen3_window", "mistral_window", "gemma3")


@pytest.mark.parametrize("page", [8, 32, 256])
@pytest.mark.parametrize("name", [*ON_SDPA, "gemma2", "gpt_oss"])
def test_tokens_equal_stock(name: str, page: int) -> None:
    stock, model = pair(name)
    given, config = prompts(6), batching(page)
    want = alone(stock, given)
    assert batched(model, given, config=config) == want
    assert_in_place(layers=model.config.num_hidden_layers)
    assert model.config._attn_implementation == "fastattn"
    if name in ON_SDPA and page == 32:
        stock.set_attn_implementation("sdpa")
        assert batched(stock, given, config=config) == want


@pytest.mark.interpreter
@pytest.mark.parametrize("name, page", [("llama", 8), ("gemma3", 32), ("gemma2", 8), ("gpt_oss", 32), ("qwen3", 256)])
def test_tokens_equal_stock_in_the_interpreter(name: str, page: int) -> None:
    stock, model = pair(name)
    given = prompts(3, 40)
    assert batched(model, given, 12, batching(page)) == alone(stock, given, 12)
    assert_in_place("triton")


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3"])
def test_tokens_equal_stock_on_a_gpu(name: str, graphs: bool) -> None:
    stock, model = pair(name, "cuda")
    given = prompts(20, 200)
    # PyTorch's experts in fp32 cannot be recorded; that is not asked for unless the user does.
    config = batching(32, 2**14, 256, use_cuda_graph=None if graphs and name == "gpt_oss" else graphs)
    assert batched(model, given, config=config) == alone(stock, given)
    assert counters.batches["decode: pages in place"] > 0 and not counters.batches["decode: windows gathered"], counters
    assert not counters.fallbacks, counters


@pytest.mark.parametrize("window", [3, 8, 13, 40])
@pytest.mark.parametrize("name", ["gemma3", "mistral_window"])
def test_rings_of_any_size(name: str, window: int) -> None:
    stock, model = pair(name)
    for one in (stock, model):
        one.config.sliding_window = window
        for module in one.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = window
    given = [*prompts(4, 60), [5], list(range(1, window + 1))]
    assert batched(model, given, 50, batching(8)) == alone(stock, given, 50)
    assert_in_place()


@pytest.mark.gpu
def test_tokens_of_a_gpu_that_is_busy_when_inputs_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' own streams do not wait for the one on which a processor's inputs are filled."""
    stock, model = pair("llama", "cuda")
    given = prompts(6)
    for name in ("__init__", "reset"):
        original = getattr(continuous_api.ContinuousBatchProcessor, name)

        def delayed(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            # Some 100 ms.
            torch.cuda._sleep(200_000_000)
            return original(*args, **kwargs)

        monkeypatch.setattr(continuous_api.ContinuousBatchProcessor, name, delayed)
    assert batched(model, given, config=batching(use_cuda_graph=True)) == alone(stock, given)
