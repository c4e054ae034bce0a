"""Pages that stay are those of the model as it is: whatever changes it between two calls, they are not found any more."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.activations import GELUActivation

import hf_fastattn
from hf_fastattn.generation import prefix_call
from hf_fastattn.graphs import model_state
from hf_fastattn.graphs.model_state import ModelState
from tests.generation.calls import run
from tests.patches.snapshots import lora
from tests.tools.models import assert_fast, single, tiny

PROMPT = single(70)


def adamw(model: Any, fused: bool) -> None:
    """A step that leaves the version counters of weights as they are, if it is fused."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=fused)
    with torch.enable_grad():
        model(**PROMPT, use_cache=False).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def one_bit(model: Any) -> None:
    weight = model.get_submodule("model.layers.0.self_attn.v_proj").weight.data.view(torch.int32)
    weight[3, 5] ^= 1 << 31


def two_signs(model: Any) -> None:
    """Two changes of the highest bit, which would cancel each other in a sum."""
    weight = model.get_submodule("model.layers.1.mlp.up_proj").weight.data.view(torch.int32)
    weight[0, 1] ^= -(1 << 31)
    weight[0, 3] ^= -(1 << 31)


def rows_exchanged(model: Any) -> None:
    weight = model.get_submodule("model.layers.0.self_attn.k_proj").weight.data
    weight[[0, 9]] = weight[[9, 0]]


def loaded(model: Any) -> None:
    other = tiny("llama", seed=3)
    model.load_state_dict(other.state_dict())


def frequencies(model: Any) -> None:
    model.get_submodule("model.rotary_emb").inv_freq.mul_(1.5)


def epsilon(model: Any) -> None:
    model.get_submodule("model.layers.0.input_layernorm").variance_epsilon = 0.5


def exchanged(model: Any) -> None:
    layer = model.get_submodule("model.layers.0")
    layer.mlp = copy.deepcopy(model.get_submodule("model.layers.1").mlp)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an optimiser": lambda model: adamw(model, fused=False),
    "a fused optimiser": lambda model: adamw(model, fused=True),
    ".data": lambda model: model.get_submodule("model.layers.0.mlp.down_proj").weight.data.mul_(1.01),
    "one bit": one_bit,
    "two signs": two_signs,
    "rows exchanged": rows_exchanged,
    "load_state_dict": loaded,
    "embeddings": lambda model: model.get_input_embeddings().weight.data[7].mul_(1.5),
    "a buffer": frequencies,
    "an attribute": epsilon,
    "the configuration": lambda model: setattr(model.config, "num_hidden_layers", 2),
    "a module": exchanged,
    "the decoder": lambda model: setattr(model.model, "embedding_multiplier", 0.7),
    "the configuration of a scale": lambda model: setattr(model.config, "attention_multiplier", 0.7),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float64": lambda model: model.to(torch.float64),
}


def answers(model: Any) -> tuple[torch.Tensor, Any]:
    with torch.no_grad():
        return run(model, PROMPT, 12), hf_fastattn.report(model).last_call


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_model_is_seen(name: str) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    assert answers(model)[1].tokens_reused == 0
    assert answers(model)[1].tokens_reused == 69
    CHANGES[name](model)
    tokens, call = answers(model)
    assert (call.tokens_reused, call.prompt_tokens, call.prefix_unused) == (0, 70, {})
    # What was computed since is of the new state.
    assert answers(model)[1].tokens_reused == 69
    hf_fastattn.unpatch(model)
    assert torch.equal(run(model, PROMPT, 12), tokens)


def test_embeddings_of_tokens_that_no_prompt_has() -> None:
    """Whatever changes, nothing is found: which weights a prompt reads is not looked at."""
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    answers(model)
    model.get_input_embeddings().weight.data[0].mul_(2)
    assert answers(model)[1].tokens_reused == 0


def scaled(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3.0


def trained(model: Any) -> None:
    adamw(model, fused=True)


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "scaled": scaled,
    "trained": trained,
    "merged": lambda model: model.merge_adapter(),
    "switched": lambda model: model.set_adapter("other"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_change_of_adapters_is_seen(name: str) -> None:
    LoraConfig = pytest.importorskip("peft").LoraConfig
    model = lora(tiny("llama"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter("default")
    model = hf_fastattn.patch(model.eval(), prefix_cache=True)
    assert answers(model)[1].tokens_reused == 0
    assert answers(model)[1].tokens_reused == 69
    ADAPTERS[name](model)
    tokens, call = answers(model)
    assert (call.tokens_reused, call.prompt_tokens) == (0, 70)
    hf_fastattn.unpatch(model)
    assert torch.equal(run(model, PROMPT, 12), tokens)


def test_pages_of_two_adapters_stay_side_by_side() -> None:
    LoraConfig = pytest.importorskip("peft").LoraConfig
    model = lora(tiny("llama"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = hf_fastattn.patch(model.eval(), prefix_cache=True)
    found = []
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        found.append(answers(model))
    assert [call.tokens_reused for _, call in found] == [0, 0, 69, 69]
    assert torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[1][0])
    with model.disable_adapter():
        assert answers(model)[1].tokens_reused == 0


def test_autocast_is_another_state() -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    answers(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert answers(model)[1].tokens_reused == 0


def test_a_hook_that_takes_packed_rows_may_change_its_mind() -> None:
    stock, model = (tiny("llama") for _ in range(2))
    hf_fastattn.patch(model, prefix_cache=True)
    amount = [0.0]

    @hf_fastattn.patches.modules.watched.takes_packed_rows
    def steer(module: Any, inputs: Any, output: Any) -> Any:
        return output + amount[0]

    for one in (stock, model):
        one.model.layers[0].mlp.register_forward_hook(steer)
    for amount[0] in (0.1, 0.5):
        tokens, call = answers(model)
        assert call.tokens_reused == 0
        assert [reason for reason in call.prefix_unused if "has hooks" in reason]
        assert torch.equal(run(stock, PROMPT, 12), tokens)


def test_drafts_of_some_layers_are_not_kept() -> None:
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    for _ in range(2):
        assert torch.equal(run(model, PROMPT, 12, assistant_early_exit=1), run(stock, PROMPT, 12, assistant_early_exit=1))
    tokens, call = answers(model)
    assert call.tokens_reused == 0
    assert torch.equal(run(stock, PROMPT, 12), tokens)


def test_frozen_weights_are_not_read() -> None:
    """What the option says is believed: only what the weights hold is not looked at."""
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True, weights="frozen")
    answers(model)
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data.mul_(1.01)
    assert answers(model)[1].tokens_reused == 69
    model.to(torch.bfloat16)
    assert answers(model)[1].tokens_reused == 0


def test_weights_that_cannot_be_looked_at() -> None:
    class Odd(torch.nn.Parameter):
        pass

    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer._parameters["weight"] = Odd(layer.weight.detach())
    for _ in range(2):
        call = answers(model)[1]
        assert call.tokens_reused == 0
        assert [reason for reason in call.prefix_unused if "Odd" in reason]


@pytest.mark.parametrize(
    ("place", "before", "after"),
    [
        ("self_attn", np.float64(0.25), np.float64(0.5)),
        ("self_attn", torch.tensor(0.25), lambda value: value.mul_(2)),
        ("mlp.act_fn", torch.relu, torch.tanh),
    ],
)
def test_attributes_are_looked_at(place: str, before: Any, after: Any) -> None:
    """Numbers of NumPy, what tensors hold, functions."""
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    name = "scaling" if place == "self_attn" else "act"
    holders = [one.get_submodule(f"model.layers.0.{place}") for one in (stock, model)]
    if place == "mlp.act_fn":
        holders = [GELUActivation() for _ in holders]
        for one, holder in zip((stock, model), holders, strict=True):
            one.get_submodule("model.layers.0.mlp").act_fn = holder
    for holder in holders:
        setattr(holder, name, copy.deepcopy(before))
    answers(model)
    assert answers(model)[1].tokens_reused == 69
    for holder in holders:
        setattr(holder, name, after(getattr(holder, name)) if isinstance(before, torch.Tensor) else after)
    tokens, call = answers(model)
    assert call.tokens_reused == 0
    assert torch.equal(tokens, run(stock, PROMPT, 12))


@pytest.mark.parametrize("place", ["parameter", "storage"])
def test_frozen_weights_may_be_replaced(place: str) -> None:
    """What is replaced may lie where something lay that has been replaced before."""
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), prefix_cache=True, weights="frozen")
    for turn in range(8):
        for one in (stock, model):
            layer = one.get_submodule("model.layers.0.self_attn.v_proj")
            changed = layer.weight.detach() * (1 + 0.5 * turn)
            if place == "parameter":
                layer.weight = torch.nn.Parameter(changed)
            else:
                layer.weight.data = changed
        tokens, call = answers(model)
        assert call.tokens_reused == 0
        assert torch.equal(tokens, run(stock, PROMPT, 12))


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


@pytest.mark.parametrize("name", ["streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"])
def test_tokens_of_a_model_that_changed_under_way_do_not_stay(name: str) -> None:
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    meddler = MeddlingCriterion(model) if name == "stopping_criteria" else Meddler(model)
    given: Any = {"streamer": meddler, "prefix_allowed_tokens_fn": lambda row, ids: meddler.put(ids) or list(range(128))}
    tokens = run(model, PROMPT, 30, **{name: given.get(name, [meddler])})
    negate(model)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(run(model, inputs, 12), run(stock, inputs, 12))
    assert assert_fast(model, held=None).tokens_reused == 64


class Switcher(Meddler):
    """One that changes the model for a few tokens."""

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls in (3, 20):
            negate(self.model)


class SwitchingCriterion(Switcher, MeddlingCriterion):
    pass


@pytest.mark.parametrize("name", ["streamer", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"])
def test_tokens_of_a_model_that_changed_for_a_while_do_not_stay(name: str) -> None:
    """At both ends of the call it is the same."""
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    switcher = SwitchingCriterion(model) if name == "stopping_criteria" else Switcher(model)
    given: Any = {"streamer": switcher, "prefix_allowed_tokens_fn": lambda row, ids: switcher.put(ids) or list(range(128))}
    tokens = run(model, PROMPT, 30, **{name: given.get(name, [switcher])})
    assert switcher.calls > 20
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


def prompts_of_one_document() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 128, (3, 70), generator=torch.Generator().manual_seed(2))
    ids[:, :40] = ids[0, :40]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("options", [{}, {"prefix_cache": True}])
def test_a_trained_prompt_before_every_other(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PromptTuningConfig, get_peft_model

    monkeypatch.setattr(prefix_call, "WORTH_ON_CPU", 1)
    pair = []
    for _ in range(2):
        torch.manual_seed(3)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        pair.append(get_peft_model(tiny("llama"), config).eval())
    stock, model = pair[0], hf_fastattn.patch(pair[1], **options)
    for turn in range(2):
        assert torch.equal(run(model, prompts_of_one_document(), 12), run(stock, prompts_of_one_document(), 12))
        assert hf_fastattn.report(model).last_call.tokens_reused == 0
        for one in pair:
            torch.manual_seed(turn)
            one.prompt_encoder["default"].embedding.weight.data.normal_()


@pytest.mark.parametrize("options", [{}, {"prefix_cache": True}])
def test_inputs_that_the_user_prepares(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_call, "WORTH_ON_CPU", 1)
    stock, model = tiny("llama"), hf_fastattn.patch(tiny("llama"), **options)
    run(model, prompts_of_one_document(), 12)
    for one in (stock, model):
        prepare = one.prepare_inputs_for_generation

        @functools.wraps(prepare)
        def prepared(*args: Any, _prepare: Any = prepare, **kwargs: Any) -> Any:
            inputs = _prepare(*args, **kwargs)
            inputs["position_ids"] = inputs["position_ids"] + 7 * torch.arange(3)[:, None]
            return inputs

        one.prepare_inputs_for_generation = prepared
    for prompt in (prompts_of_one_document(), {name: value[[0, 0, 1]] for name, value in prompts_of_one_document().items()}):
        assert torch.equal(run(model, prompt, 12), run(stock, prompt, 12))
        assert hf_fastattn.report(model).last_call.tokens_reused == 0


def test_pages_of_another_dtype_are_let_go_of() -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    answers(model)
    model.to(torch.float64)
    model.get_submodule("model.layers.0").register_forward_hook(lambda *args: None)
    answers(model)
    report = hf_fastattn.report(model)
    assert (report.pages_in_use, report.pages_kept) == (0, 0)


class Sums:
    """Stands for sums under way on a device: they hold what the weights were when they were begun."""

    made = 0

    def __init__(self, table: list[torch.Tensor]) -> None:
        self._held = [float(tensor.detach().double().sum()) for tensor in table]
        type(self).made += 1

    def sums(self) -> list[float]:
        return self._held


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> type[Sums]:
    """The weights of a CPU as a device's, which are summed beside what it does."""
    monkeypatch.setattr(model_state, "_is_whole", lambda tensor: True)
    monkeypatch.setattr(model_state, "_table", list)
    monkeypatch.setattr(model_state, "Launched", Sums)
    monkeypatch.setattr(Sums, "made", 0)
    return Sums


def test_weights_are_summed_once_a_call_from_its_beginning_on(beside: type[Sums]) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    states = model._fastattn.runtime.model_state
    for number in range(3):
        run(model, PROMPT)
        assert beside.made == 1 + number and not states._begun
    assert assert_fast(model, held=None).tokens_reused == 69
    one_bit(model)
    run(model, PROMPT)
    assert assert_fast(model, held=None).tokens_reused == 0 and beside.made == 4


def test_what_was_begun_for_a_call_that_did_not_ask_serves_no_other(beside: type[Sums]) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    states = model._fastattn.runtime.model_state
    run(model, PROMPT)
    ids = PROMPT["input_ids"]
    # Its prompt is no sequence of tokens.
    model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert not states._begun
    states.begin(model._fastattn.decoder(model))
    states.forget()
    one_bit(model)
    run(model, PROMPT)
    assert assert_fast(model, held=None).tokens_reused == 0


def test_sums_begun_of_other_tensors_are_not_taken(beside: type[Sums]) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    states, decoder = model._fastattn.runtime.model_state, model._fastattn.decoder(model)
    before = states._sums(model_state._weights_once(decoder))
    states.begin(decoder)
    held = decoder.layers[0].mlp.up_proj
    held.weight = torch.nn.Parameter(held.weight + 1)
    assert states._sums(model_state._weights_once(decoder)) != before
    assert not states._begun


@pytest.mark.gpu
def test_sums_beside_are_those_of_weights_written_just_before() -> None:
    model = hf_fastattn.patch(tiny("llama").to("cuda"), prefix_cache=True)
    states, decoder = model._fastattn.runtime.model_state, model._fastattn.decoder(model)
    before = states.of(decoder, decoder.device)
    states.begin(decoder)
    assert states._begun
    assert states.of(decoder, decoder.device) == before and not states._begun
    weight = decoder.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        # The stream is busy for milliseconds before it writes.
        torch.cuda._sleep(20_000_000)
        weight.data[0, 0] += 1
        states.begin(decoder)
    assert states.of(decoder, decoder.device) != before
