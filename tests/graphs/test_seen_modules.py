"""One look says whether the modules of a model are as they were: every change is seen, and nothing else is taken for one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_fastattn.graphs import module_columns, seen_modules
from hf_fastattn.graphs.fingerprint import fingerprint_of
from hf_fastattn.graphs.seen_modules import look
from tests.patches.snapshots import lora
from tests.tools.models import FAMILIES, pair_with_graphs, single, tiny
from tests.tools.reexecuted import reexecuted_loop


def first(model: Any, name: str) -> Any:
    return model.get_submodule(f"model.layers.0.{name}")


def exchanged(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def another_module(model: Any) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])


def names_exchanged(model: Any) -> None:
    attention = first(model, "self_attn")
    held = attention._modules
    keys, values = held["k_proj"], held["v_proj"]
    held.update(k_proj=values, v_proj=keys)


def renamed(model: Any) -> None:
    """The same modules in the same order, two of them under each other's name."""
    attention = first(model, "self_attn")
    names = {"k_proj": "v_proj", "v_proj": "k_proj"}
    attention._modules = {names.get(name, name): module for name, module in attention._modules.items()}


def parameter_renamed(model: Any) -> None:
    held = first(model, "mlp.up_proj")._parameters
    held["kernel"] = held.pop("weight")


def transposed(model: Any) -> None:
    """The same parameter, at the same address."""
    weight = first(model, "self_attn.o_proj").weight
    weight.data = weight.data.t()


def forward_replaced(model: Any) -> None:
    module = first(model, "mlp")
    forward = module.forward
    module.forward = lambda x: forward(x)


class Other(torch.nn.Linear):
    pass


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda model: setattr(first(model, "input_layernorm"), "variance_epsilon", 0.5),
    "a new attribute": lambda model: setattr(first(model, "mlp"), "factor", 2),
    "train mode": lambda model: model.train(),
    "train mode of one": lambda model: setattr(first(model, "mlp"), "training", True),
    "a parameter": lambda model: setattr(first(model, "mlp.up_proj"), "weight", torch.nn.Parameter(torch.ones(64, 32))),
    "the data of a parameter": lambda model: setattr(
        first(model, "mlp.up_proj").weight, "data", first(model, "mlp.up_proj").weight.data.clone()
    ),
    "transposed": transposed,
    "a bias": lambda model: first(model, "mlp.up_proj").register_parameter("bias", torch.nn.Parameter(torch.ones(64))),
    "a buffer": lambda model: model.model.rotary_emb.register_buffer("more", torch.ones(2)),
    "layers exchanged": exchanged,
    "names exchanged": names_exchanged,
    "renamed": renamed,
    "a parameter renamed": parameter_renamed,
    "a module": another_module,
    "a module more": lambda model: first(model, "mlp").add_module("more", torch.nn.Identity()),
    "a module less": lambda model: model.model.layers.__delitem__(1),
    "a class": lambda model: setattr(first(model, "mlp.up_proj"), "__class__", Other),
    "a forward": forward_replaced,
    "a hook": lambda model: first(model, "mlp").register_forward_hook(lambda *args: None),
    "a hook before": lambda model: first(model, "mlp").register_forward_pre_hook(lambda *args: None),
    "the configuration": lambda model: setattr(model.config, "num_hidden_layers", 1),
    "in the configuration": lambda model: model.config.rope_parameters.update(factor=3.0),
    "another configuration": lambda model: setattr(first(model, "self_attn"), "config", copy.deepcopy(model.config)),
    "a tensor": lambda model: setattr(first(model, "mlp"), "scale", torch.ones(1)),
    "a number of NumPy": lambda model: setattr(first(model, "mlp"), "scale", np.float64(0.5)),
    "a list": lambda model: setattr(first(model, "mlp"), "scales", [1.0]),
    "bfloat16": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    model = tiny("llama")
    before = look(model)
    assert before.is_sure and look(model) is before
    decoder = look(model.model)
    CHANGES[name](model)
    assert look(model) is not before
    assert look(model.model) is not decoder


def test_names_are_told_by_dictionary() -> None:
    noted = module_columns._Entries([{"a": 1}, {"b": 2}, {}])
    assert noted.hold([{"a": 1}, {"b": 3}, {}]) and noted.values([{"a": 1}, {"b": 3}, {}]) == [1, 3]
    for other in ({"a": 1, "b": 2}, {}, {}), ({"a": 1}, {"c": 2}, {}), ({"a": 1}, {"b": 2}, {"c": 3}), ({"a": 1}, {}, {}):
        assert not noted.hold(other)


def test_a_change_in_a_list_is_seen() -> None:
    model = tiny("llama")
    first(model, "mlp").scales = {"a": [1.0, 2]}
    before = look(model)
    assert before.is_sure and look(model) is before
    first(model, "mlp").scales["a"][0] = 1.5
    assert look(model) is not before


@pytest.mark.parametrize("method", ["forward", "__call__"])
def test_a_class_that_changes_is_seen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before, depends_on = look(model), fingerprint_of(model.model, model.device)
    kind: Any = type(first(model, "mlp"))
    monkeypatch.setattr(kind, method, lambda self, x: x, raising=False)
    assert look(model) is not before and fingerprint_of(model.model, model.device) != depends_on


@pytest.mark.parametrize("kind", [np.float64, np.float32, float])
def test_numbers_of_numpys_are_seen(kind: Any) -> None:
    model = tiny("llama")
    rotary = model.model.rotary_emb
    rotary.attention_scaling = kind(1.25)
    before = fingerprint_of(model.model, model.device)
    rotary.attention_scaling = kind(1.5)
    assert fingerprint_of(model.model, model.device) != before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has no such option")
def test_either_way_of_asking_for_tf32_is_seen() -> None:
    """After the newer one PyTorch answers no question about the older."""
    matmul: Any = torch.backends.cuda.matmul
    stock, model = pair_with_graphs("llama")
    before, was = fingerprint_of(model.model, model.device), matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert fingerprint_of(model.model, model.device) != before
        with reexecuted_loop():
            assert torch.equal(*(side.generate(**single(), max_new_tokens=4, do_sample=False) for side in (stock, model)))
        matmul.fp32_precision = was
        torch.set_float32_matmul_precision("high")
        assert fingerprint_of(model.model, model.device) != before
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = was


def test_hooks_on_all_modules_are_seen() -> None:
    model = tiny("llama")
    before = look(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not look(model).is_sure
    finally:
        handle.remove()
    assert look(model) is before


@pytest.mark.parametrize(
    "unsure",
    [
        lambda model: first(model, "mlp").register_forward_hook(lambda *args: None),
        lambda model: setattr(first(model, "mlp"), "scale", torch.ones(1)),
        lambda model: setattr(first(model, "mlp"), "held", [torch.ones(1)]),
        lambda model: setattr(first(model, "mlp.up_proj").weight, "ds_status", object()),
    ],
)
def test_what_may_change_inside_is_asked_every_time(unsure: Callable[[Any], Any]) -> None:
    model = tiny("llama")
    unsure(model)
    seen, asked = look(model), []
    assert not seen.is_sure and not look(model).is_sure
    for _ in range(2):
        seen.answer("anything", lambda: asked.append(1))
    assert len(asked) == 2


def test_a_question_is_asked_once() -> None:
    model, asked = tiny("llama"), []
    for _ in range(2):
        assert look(model).answer("anything", lambda: asked.append(1) or 7) == 7
    assert look(model).answer("else", lambda: 8) == 8
    assert len(asked) == 1
    assert fingerprint_of(model.model, model.device) is fingerprint_of(model.model, model.device)


def test_modes_are_remembered() -> None:
    model = tiny("llama")
    evaluated = look(model)
    model.train()
    trained = look(model)
    for _ in range(2):
        model.eval()
        assert look(model) is evaluated
        model.train()
        assert look(model) is trained


def test_weights_that_a_model_gives_up_are_free() -> None:
    """No look holds a tensor or a module."""
    import weakref

    model = tiny("llama")
    look(model)
    weights = [weakref.ref(weight) for weight in first(model, "mlp").parameters()]
    module = weakref.ref(first(model, "mlp"))
    model.model.layers[0].mlp = torch.nn.Identity()
    gc.collect()
    assert module() is None and not any(ref() is not None for ref in weights)


def test_a_model_that_has_gone_is_forgotten() -> None:
    gc.collect()
    model, known = tiny("llama"), len(seen_modules._looks)
    look(model)
    assert len(seen_modules._looks) == known + 1
    del model
    gc.collect()
    assert len(seen_modules._looks) == known


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_leave_a_model_as_it_was(family: str) -> None:
    """Or every call would be a new one."""
    model = tiny(family)
    decoder, inputs = getattr(model.model, "language_model", model.model), single(20)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    before = look(decoder)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert before.is_sure and look(decoder) is before


def test_what_was_unsure_may_become_sure() -> None:
    model = tiny("llama")
    handle = first(model, "mlp").register_forward_hook(lambda *args: None)
    assert not look(model).is_sure and not look(model).is_sure
    handle.remove()
    assert look(model).is_sure
    handle = first(model, "mlp").register_forward_hook(lambda *args: None)
    assert not look(model).is_sure
    first(model, "mlp").scale = torch.ones(1)
    del model.model.layers[0]
    gc.collect()
    assert look(model).is_sure


def test_adapters_that_change_are_seen() -> None:
    pytest.importorskip("peft")
    model = lora(tiny("llama"))
    before = look(model)
    assert before.is_sure and look(model) is before
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3.0
    assert look(model) is not before


def test_a_compiled_module_has_no_mode_of_its_own() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    before = look(model)
    assert look(model) is before or not before.is_sure
    model.model.layers[1].mlp.training = True
    assert look(model) is not before or not before.is_sure


def test_a_module_without_attributes_is_asked_every_time() -> None:
    model = tiny("llama")
    del model.model.layers[0].mlp._forward_hooks
    assert not look(model).is_sure
