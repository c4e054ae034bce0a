"""One look at the modules serves a call until its prompt's first kernel, if no code of the user's runs before that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_fastattn
from hf_fastattn.eval.accuracy import reexecuted
from hf_fastattn.eval.accuracy.reexecuted import reexecuted_loop
from hf_fastattn.graphs.module_columns import ModuleColumns
from tests.generation.calls import run
from tests.tools.models import assert_fast, single, tiny

PROMPT = single(40)


def looks_of(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> int:
    """How often a call looks at modules, beside what stands in for graphs here."""
    looked, aside = [0], reexecuted.fingerprint_of
    hold = ModuleColumns.hold

    def counted(self: ModuleColumns, *args: Any) -> bool:
        looked[0] += 1
        return hold(self, *args)

    def uncounted(*args: Any) -> Any:
        before = looked[0]
        found = aside(*args)
        looked[0] = before
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ModuleColumns, "hold", counted)
        patch.setattr(reexecuted, "fingerprint_of", uncounted)
        call()
    return looked[0]


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_call_looks_once(prefix_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=prefix_cache)
    with reexecuted_loop():
        for _ in range(3):
            run(model, PROMPT, 4)
        # Steps have graphs of their own, which are asked for while the device computes the prompt.
        assert looks_of(monkeypatch, lambda: run(model, PROMPT, 4)) == 2
        assert looks_of(monkeypatch, lambda: run(model, PROMPT, 1)) == 1
        call = assert_fast(model, held=None)
        assert call.fast_loops == 1
        assert call.appends_replayed or prefix_cache


class Asked:
    """Whether a look is taken for granted whenever code of the user's runs."""

    def __init__(self, model: Any) -> None:
        self.model, self.found = model, []

    def __call__(self, input_ids: Any = None, scores: Any = None) -> Any:
        self.found.append(self.model._fastattn.runtime.current.seen is not None)
        return scores


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}], ids=str)
def test_no_look_holds_while_a_processor_runs(options: dict[str, Any]) -> None:
    model = hf_fastattn.patch(tiny("llama"))
    asked = Asked(model)
    run(model, PROMPT, 4, logits_processor=[asked], **options)
    assert asked.found and not any(asked.found)


def meddling(name: str) -> type:
    """A class of the user's, one of whose methods changes a layer before the prompt is computed."""

    def meddle(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.model.layers[0]
        if self.is_meddled:
            layer.input_layernorm.variance_epsilon = self.config.rms_norm_eps = 0.5
        return getattr(super(kind, self), name)(*args, **kwargs)

    kind = type("MeddlingForCausalLM", (LlamaForCausalLM,), {name: meddle, "is_meddled": False})
    return kind


@pytest.mark.parametrize("name", ["_prefill", "_sample", "_call_impl", "_prepare_generated_length"])
def test_a_class_that_changes_its_modules_before_the_prompt(name: str) -> None:
    """What was recorded before is not replayed."""
    stock = tiny("llama")
    model = copy.deepcopy(stock)
    model.__class__ = meddling(name)
    model = hf_fastattn.patch(model)
    with reexecuted_loop():
        for _ in range(3):
            run(model, PROMPT, 4)
        captured = model._fastattn.runtime.graphs.history
        assert captured[0] and torch.equal(run(model, PROMPT, 4), run(stock, PROMPT, 4))
        assert model._fastattn.runtime.graphs.history == captured
        type(model).is_meddled = True
        tokens = run(model, PROMPT, 4)
        assert model._fastattn.runtime.graphs.history[1] > captured[1]
    for layer in (stock.model.layers[0], model.model.layers[0]):
        layer.input_layernorm.variance_epsilon = 0.5
    assert torch.equal(tokens, run(stock, PROMPT, 4))


def test_a_method_that_was_replaced_on_the_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_fastattn.patch(tiny("llama"))
    forward, found = LlamaForCausalLM.forward, []

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self._fastattn.runtime.current.seen is not None)
        return forward(self, *args, **kwargs)

    run(model, PROMPT, 2)
    monkeypatch.setattr(LlamaForCausalLM, "forward", own)
    run(model, PROMPT, 2)
    assert found and not any(found)
