"""A model that was changed since the patch, or attends in a way of its own, does what it would do unpatched."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama

import hf_fastattn
from hf_fastattn.transformers_version import CACHE
from tests.patches.snapshots import UNLIKE, assert_patched_equals, generate
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.models import padded_batch, pair, pair_with_graphs, tiny
from tests.tools.reexecuted import reexecuted_loop


def assert_stock(model: Any, stock: Any, reason: str) -> None:
    """Tokens are stock's, by stock's own path, which is counted; over a paged cache given by hand too."""
    assert torch.equal(generate(model), generate(stock))
    call = hf_fastattn.report(model).last_call
    assert call is not None and call.forwards == 0 and any(reason in known for known in call.fallbacks), call
    with torch.no_grad():
        expected = stock(**padded_batch()).logits
        ours = model(**padded_batch(), **{CACHE: hf_fastattn.PagedCache(model.config)}).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_replaced_after_the_patch() -> None:
    stock, model = pair("llama")
    for side in (stock, model):
        side.model.layers[1] = tiny("llama", seed=3).model.layers[1]
    assert_stock(model, stock, "the attention of layer 1 is not the one that was patched")


def test_attention_replaced_after_the_patch() -> None:
    stock, model = pair("qwen2_window")
    for side in (stock, model):
        side.model.layers[2].self_attn = tiny("qwen2_window", seed=3).model.layers[2].self_attn
    assert_stock(model, stock, "the attention of layer 2 is not the one that was patched")


def test_layers_copied_on_top() -> None:
    stock, model = pair("llama")
    for side in (stock, model):
        side.model.layers.append(copy.deepcopy(side.model.layers[1]))
        side.model.layers[3].self_attn.layer_idx = 3
        side.config.num_hidden_layers = 4
    assert_stock(model, stock, "the attention of layer 3 is not the one that was patched")
    hf_fastattn.unpatch(model)
    assert_patched_equals(stock, hf_fastattn.patch(model))


def test_layers_taken_out() -> None:
    stock, model = pair("llama")
    for side in (stock, model):
        del side.model.layers[2]
        side.config.num_hidden_layers = 2
    assert_patched_equals(stock, model)


class OwnAttention(modeling_llama.LlamaAttention):
    """A user's own."""


def test_attention_of_another_class_is_refused() -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.__class__ = OwnAttention
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn is a OwnAttention, expected a LlamaAttention"):
        hf_fastattn.patch(model)


class OwnLayer(modeling_llama.LlamaDecoderLayer):
    """A user's own, which looks at the mask."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            assert attention_mask.shape[-2] == hidden_states.shape[1]
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


def test_a_layer_of_another_class_gets_its_mask() -> None:
    stock, model = pair("llama")
    for side in (stock, model):
        side.model.layers[1].__class__ = OwnLayer
    assert_stock(model, stock, "a OwnLayer is not Transformers' own layer")


def halved(module: Any, query: torch.Tensor, *args: Any, scaling: float | None = None, **kwargs: Any) -> Any:
    """Attention of a user's own: keys count half."""
    assert scaling is not None
    return sdpa_attention_forward(module, query, *args, scaling=scaling / 2, **kwargs)


@pytest.mark.parametrize("before", [False, True])
def test_attention_of_the_users_own(before: bool) -> None:
    AttentionInterface.register("halved", halved)
    AttentionMaskInterface.register("halved", sdpa_mask)
    stock, model = tiny("llama"), tiny("llama")
    plain = generate(stock)
    stock.set_attn_implementation("halved")
    if before:
        model.set_attn_implementation("halved")
    hf_fastattn.patch(model)
    if not before:
        assert_patched_equals(tiny("llama"), model)
        model.set_attn_implementation("halved")
    assert not torch.equal(generate(stock), plain)
    assert_stock(model, stock, "attn_implementation='halved' is a function of ")
    model.set_attn_implementation("sdpa")
    assert_patched_equals(tiny("llama"), model)


@pytest.mark.parametrize("name", ["halved", "eager"])
def test_attention_of_one_layer_alone(name: str) -> None:
    """By a configuration of its own; Transformers makes the mask for the attention of all others."""
    AttentionInterface.register("halved", halved)
    stock, model = pair("llama")
    assert_patched_equals(stock, model)
    for side in (stock, model):
        attention = side.model.layers[1].self_attn
        attention.config = copy.deepcopy(attention.config)
    assert_patched_equals(stock, model)
    for side in (stock, model):
        side.model.layers[1].self_attn.config._attn_implementation = name
    assert_stock(model, stock, f"attn_implementation='{name}' in layer 1 alone")
    for side in (stock, model):
        side.model.layers[1].self_attn.config = side.config
    assert_patched_equals(stock, model)


def test_rope_replaced_in_the_models_module(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair("llama")
    original = modeling_llama.apply_rotary_pos_emb
    plain = generate(stock)

    def twice(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **kwargs: Any) -> Any:
        return original(*original(q, k, cos, sin, **kwargs), cos, sin, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", twice)
    assert not torch.equal(generate(stock), plain)
    assert_stock(model, stock, "apply_rotary_pos_emb was replaced")


@pytest.mark.parametrize("name", ["LlamaAttention", "LlamaModel"])
def test_the_forward_of_a_class_replaced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stock, model = pair("llama")
    kind = getattr(modeling_llama, name)
    original = kind.forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        if isinstance(out, tuple):
            return (1.5 * out[0], *out[1:])
        out.last_hidden_state = out.last_hidden_state.roll(1, -1)
        return out

    plain = generate(stock)
    monkeypatch.setattr(kind, "forward", louder)
    assert not torch.equal(generate(stock), plain)
    assert_stock(model, stock, f"the forward of class {name} was replaced")
    with pytest.raises(ValueError, match=f"{name}.forward was replaced by"):
        hf_fastattn.patch(tiny("llama"))


CALLED: dict[str, Callable[[Any], Any]] = {
    "model": lambda model: model,
    "decoder": lambda model: model.model,
    "layer": lambda model: model.model.layers[1],
    "attention": lambda model: model.model.layers[1].self_attn,
    "mlp": lambda model: model.model.layers[1].mlp,
    "norm": lambda model: model.model.norm,
    "rotary embedding": lambda model: model.model.rotary_emb,
    "head": lambda model: model.lm_head,
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("place", CALLED)
def test_a_class_whose_call_is_replaced_after_the_patch(
    place: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What is called runs the user's function, whichever loop would take the model and whatever it would fuse."""
    stock, model = pair_with_graphs("llama")
    kind = type(CALLED[place](stock))

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = torch.nn.Module.__call__(self, *args, **kwargs)
        if isinstance(out, tuple):
            return (1.5 * out[0], *out[1:])
        if isinstance(out, torch.Tensor):
            return out * 1.5 + torch.arange(out.shape[-1])
        name = "logits" if "logits" in out else "last_hidden_state"
        out[name] = out[name].roll(1, -1)
        return out

    with reexecuted_loop(), fused_in_torch() if fused else contextlib.nullcontext():
        plain = generate(model)
        assert torch.equal(plain, generate(stock))
        monkeypatch.setattr(kind, "__call__", called, raising=False)
        assert torch.equal(generate(model), generate(stock)) and not torch.equal(generate(model), plain)
        monkeypatch.undo()
        assert torch.equal(generate(model), plain)


@pytest.mark.parametrize("place", ["configuration", "modules"])
def test_attention_that_is_not_causal(place: str) -> None:
    stock, model = pair("llama")
    for side in (stock, model):
        if place == "configuration":
            side.config.is_causal = False
        else:
            for layer in side.model.layers:
                layer.self_attn.is_causal = False
    assert_stock(model, stock, "is_causal=False")


# ---- what others do to a patched model ------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNLIKE)
def test_the_class_of_a_patched_model_makes_plain_ones(family: str, tmp_path: Any) -> None:
    stock, model = pair(family)
    made = (type(model)(model.config), type(model)._from_config(model.config))
    model.save_pretrained(tmp_path)
    for other in (*made, type(model).from_pretrained(tmp_path)):
        assert type(other) is type(stock)
        assert not hf_fastattn.report(other).patched
    assert torch.equal(generate(other.eval()), generate(stock))
    name = next(name for name in reversed(model._fastattn.modules) if name.endswith("attn"))
    attention, plain = model.get_submodule(name), stock.get_submodule(name)
    assert type(type(attention)(attention.config, attention.layer_idx)) is type(plain)


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("used", [False, True])
def test_del_frees_the_model_at_once(family: str, used: bool) -> None:
    model = hf_fastattn.patch(tiny(family))
    if used:
        generate(model)
        model.generate(**padded_batch(), max_new_tokens=4, do_sample=True, num_return_sequences=2)
    runtime, weight = model._fastattn.runtime, model.get_input_embeddings().weight
    alive = [weakref.ref(held) for held in (model, weight, runtime.groups)]
    del runtime, weight
    gc.collect()
    gc.disable()
    try:
        del model
        assert [held() for held in alive] == [None, None, None]
    finally:
        gc.enable()


def test_copies_leave_the_original_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be generating: no attribute of the original is written, not even for a moment."""
    stock, model = pair("llama")
    written: list[str] = []
    watched = {type(module) for module in model.modules() if "_fastattn" in vars(module)}
    for kind in watched:
        monkeypatch.setattr(kind, "__setattr__", lambda self, name, value: written.append(name), raising=False)
        monkeypatch.setattr(kind, "__delattr__", lambda self, name: written.append(name), raising=False)
    twin = copy.deepcopy(model)
    assert written == [] and type(twin) is type(stock)
    monkeypatch.undo()
    assert torch.equal(generate(twin), generate(stock))


def test_a_copied_layer_is_plain() -> None:
    layer = copy.deepcopy(hf_fastattn.patch(tiny("llama")).model.layers[1])
    assert type(layer.self_attn) is modeling_llama.LlamaAttention and "_fastattn" not in vars(layer.self_attn)


def test_a_forward_compiled_since_survives_unpatch() -> None:
    stock, model = pair("llama")
    attention = model.model.layers[1].self_attn
    compiled = torch.compile(attention.forward, backend="eager")
    attention.forward = compiled
    assert torch.equal(generate(model), generate(stock))
    hf_fastattn.unpatch(model)
    assert vars(attention)["forward"] is compiled
    assert torch.equal(generate(model), generate(stock))
    assert type(attention) is modeling_llama.LlamaAttention and "hf_fastattn" in sys.modules
