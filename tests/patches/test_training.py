"""Training a patched model, and generating in train mode."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
)

import hf_fastattn
from hf_fastattn.graphs.forward_graphs import ForwardGraphs
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.transformers_version import CACHE
from tests.patches.snapshots import assert_patched_equals, generate, gradients
from tests.tools.models import CORE, pair


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_stock(family: str, checkpointing: bool, training: bool) -> None:
    stock, model = pair(family)
    for side in (stock, model):
        side.train(training)
        if checkpointing:
            side.gradient_checkpointing_enable()
    generate(model)
    expected, ours = gradients(stock), gradients(model)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name
    assert set(expected) == {name for name, _ in stock.named_parameters()}


@pytest.mark.parametrize("family", CORE)
def test_gradients_through_a_paged_cache(family: str) -> None:
    stock, model = pair(family)
    expected = gradients(stock, **{CACHE: DynamicCache(config=stock.config)})
    ours = gradients(model, **{CACHE: hf_fastattn.PagedCache(model.config)})
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4)
    fallbacks = hf_fastattn.report(model).last_call.fallbacks
    assert fallbacks and all("grad" in reason for reason in fallbacks)


@pytest.mark.parametrize("family", CORE)
def test_train_mode_generates_on_the_fast_path(family: str) -> None:
    stock, model = pair(family)
    stock.train()
    model.train()
    with torch.no_grad():
        assert_patched_equals(stock, model)
    assert model.training


@pytest.mark.parametrize(("training", "small", "kept"), [(False, 0, True), (True, 0, False), (True, 2**20, True)])
def test_memory_between_calls(training: bool, small: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in train mode keeps no pages but small ones, so that a training step finds its memory free."""
    monkeypatch.setattr("hf_fastattn.runtime.KEPT_IN_TRAINING", small)
    _, model = pair("qwen2_window")
    generate(model.train(training))
    assert (hf_fastattn.report(model).page_bytes_allocated > 0) == kept
    assert hf_fastattn.report(model).pages_in_use == 0


def test_graphs_of_prompts_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they alone are too large for train mode, pages stay."""
    sizes = {ForwardGraphs: 2**20, LoopGraphs: 0}
    for kind, size in sizes.items():
        monkeypatch.setattr(kind, "nbytes", property(lambda self, size=size: size), raising=False)
    monkeypatch.setattr("hf_fastattn.runtime.KEPT_IN_TRAINING", 2**20)
    _, model = pair("qwen2_window")
    graphs = model._fastattn.runtime.graphs
    generate(model.train())
    assert 0 < hf_fastattn.report(model).page_bytes_allocated < 2**20 and graphs.prompts_rest
    generate(model.eval())
    assert not graphs.prompts_rest


def test_keep_memory_zero() -> None:
    stock, model = pair("llama", {"keep_memory": 0})
    for _ in range(2):
        assert_patched_equals(stock, model)
        assert hf_fastattn.report(model).page_bytes_allocated == 0


def test_dropout_falls_back() -> None:
    stock, model = pair("llama", attention_dropout=0.2)
    assert_patched_equals(stock, model)
    stock.train()
    model.train()
    assert torch.equal(generate(model), generate(stock))
    fallbacks = hf_fastattn.report(model).last_call.fallbacks
    assert fallbacks and all("dropout" in reason for reason in fallbacks)


def test_weights_may_change_in_place() -> None:
    stock, model = pair("qwen2")
    first = generate(model)
    for step in range(3):
        for side in (stock, model):
            generator = torch.Generator().manual_seed(step)
            for parameter in side.parameters():
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        assert_patched_equals(stock, model)
    assert not torch.equal(generate(model), first)
