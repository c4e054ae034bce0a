"""Code of users that runs in a call and may change the model: what was computed with it is not found later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs.model_state import ModelState
from tests.generation.calls import run
from tests.generation.test_prefix_stale import PROMPT, answers, epsilon
from tests.tools.models import assert_fast, tiny


class Meddler:
    """A streamer or processor that changes the model at its fifth call."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        self.put(input_ids)
        return scores

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 5:
            negate(self.model)

    def end(self) -> None:
        pass


def negate(model: Any) -> None:
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data.neg_()


class MeddlingCriterion(Meddler):
    """The same as a stopping criterion."""

    def __call__(self, input_ids: Any, scores: Any) -> torch.Tensor:
        self.put(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_weights_are_looked_at_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = hf_fastattn.patch(tiny("llama"), prefix_cache=True), []
    of = ModelState.of
    monkeypatch.setattr(ModelState, "of", lambda self, *args: looked.append(1) or of(self, *args))
    run(model, PROMPT, 5, repetition_penalty=1.1, eos_token_id=127)
    assert len(looked) == 1
    run(model, PROMPT, 5, prefix_allowed_tokens_fn=lambda row, ids: list(range(100)))
    assert len(looked) == 2


class Switcher(Meddler):
    """One that changes the model for a few tokens."""

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls in (3, 20):
            negate(self.model)


class SwitchingCriterion(Switcher, MeddlingCriterion):
    pass


@pytest.mark.parametrize("name", ["streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"])
@pytest.mark.parametrize("kinds", [(Meddler, MeddlingCriterion), (Switcher, SwitchingCriterion)], ids=["stays", "goes back"])
def test_tokens_of_a_model_that_changed_under_way_do_not_stay(kinds: tuple[type[Meddler], type[Meddler]], name: str) -> None:
    """With one that goes back the model is the same at both ends of the call."""
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    meddler = kinds[name == "stopping_criteria"](model)
    given: Any = {"streamer": meddler, "prefix_allowed_tokens_fn": lambda row, ids: meddler.put(ids) or list(range(128))}
    tokens = run(model, PROMPT, 30, **{name: given.get(name, [meddler])})
    assert meddler.calls > 20
    if kinds[0] is Meddler:
        negate(model)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(run(model, inputs, 12), run(stock, inputs, 12))
    assert assert_fast(model, held=None).tokens_reused == 64


def test_hooks_of_the_output_layer_may_change_the_model() -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)

    @hf_fastattn.patches.modules.watched.takes_packed_rows
    def meddle(*args: Any) -> None:
        pass

    model.lm_head.register_forward_hook(meddle)
    for _ in range(2):
        call = answers(model)[1]
        assert call.tokens_reused == 0
        assert [reason for reason in call.prefix_unused if "a Linear has hooks" in reason]


# What may change before the prompt: weights, which are summed from the beginning of a call on, and modules.
EARLY: dict[str, Callable[[Any], Any]] = {"weights": negate, "an attribute": epsilon}


class Putter:
    """A streamer that changes the model when it gets the prompt, which is before that is computed."""

    def __init__(self, change: Callable[[], Any]) -> None:
        self.change, self.puts = change, 0

    def put(self, value: Any) -> None:
        if not self.puts:
            self.change()
        self.puts += 1

    def end(self) -> None:
        pass


def assert_seen_late(change: Callable[[Any], Any], prepare: Callable[[Any, Callable[[], Any]], dict[str, Any]]) -> None:
    """Whatever `prepare` has a call run before its prompt may change the model; it gives options of the call."""
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    answers(model)
    assert answers(model)[1].tokens_reused == 69
    change(stock)
    expected = run(stock, PROMPT, 12)
    assert torch.equal(run(model, PROMPT, 12, **prepare(model, lambda: change(model))), expected)
    assert hf_fastattn.report(model).last_call.tokens_reused == 0


@pytest.mark.parametrize("name", EARLY)
def test_a_change_before_the_prompt_is_seen(name: str) -> None:
    assert_seen_late(EARLY[name], lambda model, change: {"streamer": Putter(change)})


@pytest.mark.parametrize("name", EARLY)
def test_a_model_with_a_function_of_its_own_is_looked_at_late(name: str) -> None:
    """What the user has put in the place of a method may change the model."""

    def prepare(model: Any, change: Callable[[], Any]) -> dict[str, Any]:
        prepare_length = model._prepare_generated_length

        def prepared(**kwargs: Any) -> Any:
            change()
            return prepare_length(**kwargs)

        model._prepare_generated_length = prepared
        return {}

    assert_seen_late(EARLY[name], prepare)


@pytest.mark.parametrize("name", EARLY)
def test_a_class_with_a_function_of_its_own_is_looked_at_late(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: Any, change: Callable[[], Any]) -> dict[str, Any]:
        kind: Any = type(model)._fastattn_base
        prepare_length = kind._prepare_generated_length

        @functools.wraps(prepare_length)
        def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
            change()
            return prepare_length(self, *args, **kwargs)

        monkeypatch.setattr(kind, "_prepare_generated_length", prepared)
        return {}

    assert_seen_late(EARLY[name], prepare)
