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
from tests.generation.calls import run
from tests.patches.snapshots import lora
from tests.tools.models import single, tiny

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
