"""What happens to the model between calls, and to a capture: the device's loop sees it, or makes way.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.loop.loop_graphs import LoopGraphs
from hf_fastattn.transformers_version import CHECKPOINTING_NEEDS_GRADIENTS
from tests.loop.test_decode_loop import assert_looped, both, run
from tests.tools.models import assert_fast, noisy, padded_batch, pair_with_graphs, patch_with_graphs, tiny
from tests.tools.reexecuted import ReexecutedLoopStep

NEW = 16


pytestmark = pytest.mark.usefixtures("device")


def test_weights_changed_in_place_are_seen(device: str) -> None:
    stock, model = both("llama", device)
    before = run(model, NEW)
    for candidate in (stock, model):
        noisy(candidate.cpu(), 0.05).to(device)
    run(model, NEW)
    for candidate in (stock, model):
        with torch.no_grad():
            candidate.lm_head.weight.mul_(-1)
    want = run(stock, NEW)
    assert torch.equal(run(model, NEW), want) and not torch.equal(want, before)
    assert assert_looped(model).graphs_captured == 0


def change_dtype(model: Any) -> None:
    model.to(torch.float64 if model.device.type == "cpu" else torch.bfloat16).float()


def change_weight(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.5)


def change_head(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())


def change_module(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()


def change_number(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def change_buffer(model: Any) -> None:
    model.model.rotary_emb.register_buffer("inv_freq", model.model.rotary_emb.inv_freq * 0.5, persistent=False)


@pytest.mark.parametrize("change", [change_dtype, change_weight, change_head, change_module, change_number, change_buffer])
def test_a_changed_model_is_captured_anew(device: str, change: Callable[[Any], None]) -> None:
    stock, model = both("llama", device)
    before = run(model, NEW)
    for candidate in (stock, model):
        change(candidate)
    want = run(stock, NEW)
    assert change is change_dtype or not torch.equal(want, before)
    assert torch.equal(run(model, NEW), want)
    assert assert_looped(model).graphs_captured == 1


def test_adapters(device: str) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(4)
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**options), "first")
        model.add_adapter("second", peft.LoraConfig(**options, lora_alpha=32))
        return model.to(device)

    stock, model = adapted(), patch_with_graphs(adapted())

    def check(captured: int, fused: bool = True) -> torch.Tensor:
        want = run(stock, NEW)
        assert torch.equal(run(model, NEW), want)
        call = assert_looped(model)
        assert call.graphs_captured == captured
        # On the CPU the reference backend calls the layers.
        assert bool(call.adapters_fused) == (bool(captured) and fused and device == "cuda")
        return want

    first = check(1)
    check(0)
    for candidate in (stock, model):
        candidate.set_adapter("second")
    second = check(1)
    with stock.disable_adapter(), model.disable_adapter():
        plain = check(1, fused=False)
    check(1)
    for candidate in (stock, model):
        for module in candidate.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["second"] *= 0.25
    scaled = check(1)
    for candidate in (stock, model):
        candidate.delete_adapter("second")
        candidate.set_adapter("first")
    assert torch.equal(check(1), first)
    assert len({tuple(tokens.flatten().tolist()) for tokens in (first, second, plain, scaled)}) == 4


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.layers.2.self_attn.q_proj", "model.norm", "lm_head", ""])
def test_hooks_are_called(device: str, where: str) -> None:
    stock, model = both("llama", device)
    run(model, 8)
    calls: list[int] = []

    def hook(module: Any, given: Any, output: Any) -> Any:
        calls.append(1)
        if isinstance(output, torch.Tensor):
            return output * 1.01
        output.logits = output.logits.roll(1, -1)
        return output

    handles = [candidate.get_submodule(where).register_forward_hook(hook) for candidate in (stock, model)]
    assert torch.equal(run(model, 8), run(stock, 8))
    assert len(calls) == 2 * 8 and hf_fastattn.report(model).last_call.fast_loops == 0
    for handle in handles:
        handle.remove()
    assert torch.equal(run(model, 8), run(stock, 8))
    assert_looped(model)


@pytest.mark.parametrize("when", ["first run", "recording"])
def test_a_failed_capture(when: str, device: str) -> None:
    if device == "cuda":
        pytest.skip("which step fails is chosen by a step that is not recorded")

    class Failing(ReexecutedLoopStep):
        def capture(self, run: Any, warmed_up: Any) -> None:
            if when == "first run":
                raise torch.OutOfMemoryError("no memory left")
            run()
            raise RuntimeError("operation not permitted when stream is capturing")

    stock, model = both("llama", device)
    want = run(stock, NEW)
    # Undone before what the fixture has patched.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoopGraphs, "forward_type", Failing)
        for tries in range(2):
            assert torch.equal(run(model, NEW), want)
            call = assert_fast(model)
            # Once: the launches go on one by one, until the model changes.
            assert (call.fast_loops, call.graphs_replayed, sum(call.uncaptured.values())) == (1, 0, 1 - tries)
    change_head(stock)
    change_head(model)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert_looped(model)


def test_a_step_that_fails_leaves_nothing_behind(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = both("llama", device)
    want, replay, calls = run(stock, NEW), LoopGraphs.replay, []

    def failing(self: LoopGraphs, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise torch.OutOfMemoryError("no memory left")
        return replay(self, *args)

    monkeypatch.setattr(LoopGraphs, "replay", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run(model, NEW)
    assert hf_fastattn.report(model).pages_in_use == 0
    assert torch.equal(run(model, NEW), want)


def test_a_pad_token_outside_the_vocabulary(device: str) -> None:
    stock, model = both("llama", device)
    prompt = {"input_ids": padded_batch(1)["input_ids"], "attention_mask": None}
    options = {**prompt, "pad_token_id": -1, "eos_token_id": list(range(3, 128, 9))}
    assert torch.equal(run(model, 40, **options), run(stock, 40, **options))
    assert hf_fastattn.report(model).last_call.fast_loops == 0


def test_two_models_at_once(device: str) -> None:
    pairs = [tuple(model.to(device) for model in pair_with_graphs("llama", seed=seed)) for seed in (0, 1)]
    for _ in range(2):
        for stock, model in pairs:
            assert torch.equal(run(model, NEW), run(stock, NEW))
            assert_looped(model)


def test_train_mode_keeps_nothing_and_unpatch_drops_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.runtime.KEPT_IN_TRAINING", 0)
    _, model = both("llama", device)
    graphs = model._fastattn.runtime.loop_graphs
    model.train()
    with torch.no_grad():
        run(model, NEW)
    assert_looped(model)
    assert len(graphs) == 0 and graphs.state is None
    model.eval()
    run(model, NEW)
    state = weakref.ref(graphs.state)
    del graphs
    hf_fastattn.unpatch(model)
    gc.collect()
    assert state() is None


def test_checkpointing_in_train_mode(device: str) -> None:
    """Its hook marks the embeddings for gradients, and changes nothing without them; nor does a layer drop the cache."""
    stock, model = both("llama", device)
    want = run(stock, NEW)
    model.gradient_checkpointing_enable()
    model.train()
    assert model.get_input_embeddings()._forward_hooks
    assert torch.equal(run(model, NEW), want)
    assert_looped(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    if CHECKPOINTING_NEEDS_GRADIENTS:
        stock.gradient_checkpointing_enable()
        stock.train()
        assert torch.equal(run(stock, NEW), want)
