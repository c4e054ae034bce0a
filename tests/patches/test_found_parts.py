"""What a call's first steps find of the modules serves those that follow, unless code of the user's may change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_fastattn
from hf_fastattn.patches.fused import forward, plain_products
from tests.generation.calls import run
from tests.tools.models import assert_fast, pair, single, tiny

PROMPT, NEW = single(20), 6


def looks_of(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> tuple[int, int]:
    """How often a call asks whether layers are walked through, and whether a module is a plain linear layer or norm."""
    asked = [0, 0]

    def counting(place: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            asked[place] += 1
            return function(*args)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(forward, "_why_not_walked", counting(0, forward._why_not_walked))
        patch.setattr(plain_products, "is_plain", counting(1, plain_products.is_plain))
        call()
    return asked[0], asked[1]


def test_steps_look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    for _ in range(2):
        walked, modules = looks_of(monkeypatch, lambda: run(model, PROMPT, NEW))
        # The prompt's forward, and the first step.
        assert walked == 2 and modules == 2 * 7 * len(model.model.layers)
    assert torch.equal(run(model, PROMPT, NEW), run(stock, PROMPT, NEW))
    assert_fast(model)
    # Nothing is known of the next call's modules.
    for one in (stock, model):
        layer = one.model.layers[1]
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight * 1.5)
        layer.mlp.down_proj = Negative(layer.mlp.down_proj)
    assert torch.equal(run(model, PROMPT, NEW), run(stock, PROMPT, NEW))


class Negative(nn.Module):
    """Minus what another module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return -self.inner(x)


class Meddler:
    """Exchanges weights, and a module, between two tokens."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        layer = self.model.model.layers[0]
        if self.calls == 3:
            layer.mlp.down_proj.weight = nn.Parameter(-layer.mlp.down_proj.weight.detach())
        if self.calls == 4:
            layer.input_layernorm.weight = nn.Parameter(3 * layer.input_layernorm.weight.detach())
        if self.calls == 5:
            layer.self_attn.v_proj = Negative(layer.self_attn.v_proj)
        return args[-1]


@pytest.mark.parametrize("by", ["processor", "hook"])
def test_modules_that_change_between_two_tokens(by: str) -> None:
    def call(model: Any) -> Any:
        meddler = Meddler(model)
        if by == "processor":
            return run(model, PROMPT, NEW, logits_processor=[meddler]), meddler.calls
        hook = model.model.layers[2].mlp.down_proj.register_forward_hook(meddler)
        try:
            return run(model, PROMPT, NEW), meddler.calls
        finally:
            hook.remove()

    stock, model = pair("llama")
    undisturbed = run(stock, PROMPT, NEW)
    (want, times), (got, same) = call(stock), call(model)
    assert times == same == NEW and torch.equal(got, want) and not torch.equal(got, undisturbed)


def test_a_hook_on_all_modules_during_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come from another thread."""
    model, inner = hf_fastattn.patch(tiny("llama")), forward.why_not_these
    seen: set[Any] = set()
    hooks: list[Any] = []

    def late(decoder: Any, arguments: Any) -> Any:
        if model._fastattn.runtime.current.is_steady and not hooks:
            hooks.append(nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module))))
        return inner(decoder, arguments)

    monkeypatch.setattr(forward, "why_not_these", late)
    try:
        run(model, PROMPT, NEW)
    finally:
        for hook in hooks:
            hook.remove()
    assert hooks and type(model.model.layers[0]) in seen
