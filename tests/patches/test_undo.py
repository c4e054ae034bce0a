"""Patching touches one instance, and is undone without a trace."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from transformers import (
    GenerationMixin,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_fastattn
from tests.patches.snapshots import assert_patched_equals, assert_plain, generate, snapshot
from tests.tools.models import CORE, pair, tiny


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("used", [False, True])
def test_unpatch_restores_every_attribute(family: str, used: bool) -> None:
    model = tiny(family)
    before = snapshot(model)
    assert hf_fastattn.patch(model) is model
    assert snapshot(model) != before
    if used:
        generate(model)
        generate(model, num_beams=3)
    assert hf_fastattn.unpatch(model) is model
    assert snapshot(model) == before
    assert_plain(model, family)


def test_patch_again_after_unpatch() -> None:
    stock, model = pair("llama")
    for page_size in (4, 32):
        hf_fastattn.unpatch(model)
        hf_fastattn.patch(model, page_size=page_size)
        assert_patched_equals(stock, model)


def test_patched_is_undone_at_the_end() -> None:
    model = tiny("qwen2")
    before = snapshot(model)
    with hf_fastattn.patched(model, page_size=8) as inside:
        assert inside is model
        assert_patched_equals(tiny("qwen2"), model)
    assert snapshot(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_patched_is_undone_after_an_exception(error: type[BaseException]) -> None:
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(error, match="inside"):
        with hf_fastattn.patched(model):
            generate(model)
            raise error("inside")
    assert snapshot(model) == before


@pytest.mark.parametrize("family", CORE)
def test_other_models_are_untouched(family: str) -> None:
    other = tiny(family)
    before = snapshot(other)
    classes = {type(module) for module in other.modules()} | {GenerationMixin}
    class_attributes = {cls: dict(vars(cls)) for cls in classes}
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    model = hf_fastattn.patch(tiny(family))
    generate(model)
    assert snapshot(other) == before
    for cls, attributes in class_attributes.items():
        assert dict(vars(cls)) == attributes, cls
    assert dict(ALL_ATTENTION_FUNCTIONS) == functions
    assert_plain(other, family)
    assert_plain(tiny(family), family)


def parameters(function: Any) -> list[tuple[str, Any]]:
    """What callers and `generate()` see of a signature."""
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("family", CORE)
def test_a_patched_model_looks_like_its_class(family: str) -> None:
    stock, model = pair(family)
    assert isinstance(model, type(stock))
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), name) == getattr(type(stock), name)
    assert repr(model) == repr(stock)
    assert model.state_dict().keys() == stock.state_dict().keys()
    for (name, ours), (_, theirs) in zip(model.named_modules(), stock.named_modules(), strict=True):
        assert parameters(ours.forward) == parameters(theirs.forward), name
    for name in ("generate", "prepare_inputs_for_generation"):
        assert parameters(getattr(model, name)) == parameters(getattr(stock, name))


def test_patch_twice() -> None:
    model = hf_fastattn.patch(tiny("llama"), page_size=32)
    before = snapshot(model)
    assert hf_fastattn.patch(model, page_size=32) is model
    assert hf_fastattn.patch(model, hf_fastattn.FastAttnConfig(page_size=32)) is model
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"(?s)32.*unpatch|unpatch.*32"):
        hf_fastattn.patch(model, page_size=16)
    assert snapshot(model) == before
    hf_fastattn.unpatch(model)
    assert_plain(model, "llama")
