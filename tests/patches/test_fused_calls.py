"""Modules that are not plain are called, and what asks for more than a walk over the layers runs as it was."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import hf_fastattn
from hf_fastattn.patches.fused.forward import fused_reason
from hf_fastattn.transformers_version import CACHE, CHECKPOINTING_NEEDS_GRADIENTS
from tests.tools.fused_layers import LAYER_COUNT, SMALL, assert_logits, build, count_launches, expected, steps
from tests.tools.models import tiny


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_launches(monkeypatch)


class Louder(nn.Linear):
    """Not what its base class computes."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def louder(module: Any, *given: Any) -> Any:
    """A forward hook."""
    out = given[-1]
    return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out


class LouderHook(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return 1.5 * output


def hook_on(path: str) -> Callable[[Any], None]:
    return lambda model: _first(model).get_submodule(path).register_forward_hook(louder)


def _first(model: Any) -> Any:
    return model.model.layers[0]


def _replace(model: Any) -> None:
    old = _first(model).self_attn.o_proj
    new = Louder(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    _first(model).self_attn.o_proj = new


def _replace_forward(model: Any) -> None:
    down = _first(model).mlp.down_proj
    down.forward = types.MethodType(lambda self, x: 1.5 * nn.Linear.forward(self, x), down)


def _transpose(model: Any) -> None:
    up = _first(model).mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().T.contiguous().T)


def _own_norm(model: Any) -> None:
    norm = _first(model).post_attention_layernorm
    norm.forward = types.MethodType(lambda self, x: 1.5 * type(self).forward(self, x), norm)


def _before(model: Any) -> None:
    _first(model).self_attn.k_proj.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))


# Name -> what is done to a model, and how launches of 2 tokens differ then from those of plain layers.
CHANGES: dict[str, tuple[Callable[[Any], object], dict[str, int]]] = {
    "hook on q": (hook_on("self_attn.q_proj"), {"matvec": -1}),
    "hook before k": (_before, {"matvec": -1}),
    "hook on o": (hook_on("self_attn.o_proj"), {"matvec": -1, "rms_norm": -1, "add_rms_norm": 1}),
    "hook on gate": (hook_on("mlp.gate_proj"), {"gate_up_silu": -1, "silu_and_mul": 1}),
    "hook on the activation": (hook_on("mlp.act_fn"), {"gate_up_silu": -1, "matvec": 1}),
    "hook on down": (hook_on("mlp.down_proj"), {"matvec": -1, "rms_norm": -1, "add_rms_norm": 1}),
    "hook on the MLP": (
        hook_on("mlp"), {"gate_up_silu": -1, "matvec": -1, "rms_norm": -1, "add_rms_norm": 1}
    ),
    "hook on attention": (hook_on("self_attn"), {"matvec": -2, "rms_norm": -1, "add_rms_norm": 1}),
    "hook on a norm": (hook_on("input_layernorm"), {"rms_norm": -1}),
    "hook on the last norm": (lambda model: model.model.norm.register_forward_hook(louder), {"rms_norm": -1}),
    "hook of accelerate": (
        lambda model: add_hook_to_module(_first(model).mlp.up_proj, LouderHook()), {"gate_up_silu": -1, "silu_and_mul": 1}
    ),
    "forward of a norm": (_own_norm, {"rms_norm": -1}),
    "forward of down": (_replace_forward, {"matvec": -1, "rms_norm": -1, "add_rms_norm": 1}),
    "another class": (_replace, {"matvec": -1, "rms_norm": -1, "add_rms_norm": 1}),
    "weight that is not contiguous": (_transpose, {"gate_up_silu": -1, "silu_and_mul": 1}),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CHANGES)
def test_modules_that_are_not_plain_are_called(name: str, launched: Counter[str]) -> None:
    change, difference = CHANGES[name]
    stock, model = build("llama"), hf_fastattn.patch(build("llama"))
    ids = torch.tensor([[5, 6, 7]])
    change(stock)
    change(model)
    assert fused_reason(model.model) is None
    outs = steps(model, ids, None, [2], hf_fastattn.PagedCache(model.config))
    want = Counter(expected(2))
    want.update(difference)
    assert dict(launched) == {kernel: count for kernel, count in want.items() if count}
    assert_logits(name, stock, outs[0], ids[:, :2], None, [2])


@pytest.mark.interpreter
def test_one_token_beside_called_modules(launched: Counter[str]) -> None:
    """What a called module leaves to be added goes into the next norm."""
    stock, model = build("llama"), hf_fastattn.patch(build("llama"))
    for each in (stock, model):
        hook_on("self_attn.o_proj")(each)
        hook_on("mlp.down_proj")(each)
    ids = torch.tensor([[5]])
    outs = steps(model, ids, None, [1], hf_fastattn.PagedCache(model.config))
    assert dict(launched) == {"matvec": 4, "gate_up_silu": 2, "rms_norm": 3, "add_rms_norm": 2}
    assert_logits("hooked", stock, outs[0], ids, None, [1])


@pytest.mark.interpreter
def test_another_activation(launched: Counter[str]) -> None:
    over = {**SMALL, "hidden_act": "gelu"}
    stock, model = tiny("llama", **over), hf_fastattn.patch(tiny("llama", **over))
    ids = torch.tensor([[5, 6, 7]])
    outs = steps(model, ids[:, :2], None, [2], hf_fastattn.PagedCache(model.config))
    assert launched["gate_up_silu"] == launched["silu_and_mul"] == 0
    assert launched["matvec"] == 4 * LAYER_COUNT
    assert_logits("gelu", stock, outs[0], ids[:, :2], None, [2])


def _checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.train()


# What makes a whole decoder run as it was, and a word of the reason.
ORIGINAL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook on a layer": (hook_on(""), "LlamaDecoderLayer"),
    "hook on all modules": (lambda model: register_module_forward_hook(lambda *given: None), "all modules"),
    "hidden states": (lambda model: setattr(model.config, "output_hidden_states", True), "output_hidden_states"),
    "checkpointing": (_checkpointing, "checkpointing"),
    "double": (lambda model: model.double(), "float64"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ORIGINAL)
def test_decoders_that_run_as_they_were(name: str, launched: Counter[str]) -> None:
    change, word = ORIGINAL[name]
    stock, model = build("llama"), hf_fastattn.patch(build("llama"))
    handle = [change(each) for each in (stock, model)]
    try:
        assert word in (fused_reason(model.model) or "")
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            cache = hf_fastattn.PagedCache(model.config)
            torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
        # Without gradients nothing is checkpointed since 5.24, and the layers are fused.
        assert bool(launched) == (name == "checkpointing" and CHECKPOINTING_NEEDS_GRADIENTS)
    finally:
        for each in handle:
            if hasattr(each, "remove"):
                each.remove()


@pytest.mark.interpreter
def test_what_is_asked_for_besides(launched: Counter[str]) -> None:
    stock, model = build("llama"), hf_fastattn.patch(build("llama"))
    ids = torch.tensor([[5, 6, 7]])
    embeds = model.model.embed_tokens(ids).detach()

    def run(**kwargs: Any) -> Any:
        launched.clear()
        return model.model(**{CACHE: hf_fastattn.PagedCache(model.config)}, **kwargs)

    with torch.no_grad():
        want = stock.model(ids).last_hidden_state
        states = run(input_ids=ids, output_hidden_states=True).hidden_states
        assert len(states) == LAYER_COUNT + 1 and not launched
        outputs = run(inputs_embeds=embeds, return_dict=False)
        assert isinstance(outputs, tuple) and launched["gate_up_silu"] == LAYER_COUNT
        torch.testing.assert_close(outputs[0], want, rtol=1e-4, atol=1e-4)
        # Hooks that Transformers has left since it was asked for hidden states do nothing.
        outputs = run(input_ids=ids, use_cache=True)
        assert type(outputs) is type(stock.model(ids)) and outputs[CACHE] is not None
        assert launched["gate_up_silu"] == LAYER_COUNT and fused_reason(model.model) is None
        torch.testing.assert_close(outputs.last_hidden_state, want, rtol=1e-4, atol=1e-4)
        run(input_ids=ids, use_cache=False)
        assert not launched
    model.requires_grad_(False)
    outputs = run(inputs_embeds=embeds.requires_grad_())
    assert not launched and outputs.last_hidden_state.requires_grad


@pytest.mark.interpreter
def test_hooks_and_weights_that_come_and_go(launched: Counter[str]) -> None:
    stock, model = build("llama"), hf_fastattn.patch(build("llama"))
    ids = torch.tensor([[5, 6]])

    def check(fused: bool) -> Tensor:
        launched.clear()
        out = steps(model, ids, None, [2], hf_fastattn.PagedCache(model.config))[0]
        assert (dict(launched) == expected(2)) == fused
        with torch.no_grad():
            torch.testing.assert_close(out, stock(ids).logits, rtol=1e-4, atol=1e-4)
        return out

    seen = [check(True)]
    handles = [_first(each).self_attn.v_proj.register_forward_hook(louder) for each in (stock, model)]
    seen.append(check(False))
    for handle in handles:
        handle.remove()
    assert torch.equal(check(True), seen[0])
    for each in (stock, model):
        with torch.no_grad():
            _first(each).mlp.gate_proj.weight.mul_(2)
            _first(each).input_layernorm.weight.data.add_(1)
    seen.append(check(True))
    for each in (stock, model):
        _first(each).self_attn.o_proj.weight = nn.Parameter(torch.full((64, 64), 0.1))
        _first(each).mlp.down_proj = nn.Linear(96, 64, bias=False)
        nn.init.constant_(_first(each).mlp.down_proj.weight, 0.2)
    seen.append(check(True))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
