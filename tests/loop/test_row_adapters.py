"""Several adapters in one batch (PEFT's `adapter_names=`), and several on one layer, in the device's loop.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`), with PyTorch's versions of
the kernels (`fused_in_torch`), or with these in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import hf_fastattn
from tests.loop.test_decode_loop import assert_looped, run
from tests.tools.fused_in_torch import fused_in_torch
from tests.tools.models import assert_fast, padded_batch, patch_with_graphs, real_tokens, tiny
from tests.tools.reexecuted import reexecuted_loop

peft = pytest.importorskip("peft")

# The interpreter is slow.
NEW = 4 if os.environ.get("TRITON_INTERPRET") == "1" else 12
SMALL = {
    "num_hidden_layers": 2, "initializer_range": 0.3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ["second", "__base__", "first"]
OTHERS = ["third", "first", "second"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
        return
    with reexecuted_loop(), fused_in_torch():
        yield "cpu"


def adapted(device: str = "cpu", family: str = "llama", third: dict[str, Any] | None = None, **over: Any) -> Any:
    """A model with three adapters, of other ranks, scales and layers."""
    torch.manual_seed(4)
    options = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    first = peft.LoraConfig(r=4, target_modules=SEVEN, lora_alpha=6, **options)
    model = peft.get_peft_model(tiny(family, **{**SMALL, **over}), first, "first")
    model.add_adapter("second", peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], **options))
    third = {"r": 2, "target_modules": ["v_proj", "o_proj", "up_proj"], "lora_alpha": 9, **(third or {})}
    model.add_adapter("third", peft.LoraConfig(**third, **options))
    return model.to(device).eval()


def both(device: str, **options: Any) -> tuple[Any, Any]:
    return adapted(device, **options), patch_with_graphs(adapted(device, **options))


def rows(padded: bool) -> dict[str, torch.Tensor]:
    batch = padded_batch(3, 13)
    if not padded:
        batch = {"input_ids": batch["input_ids"].clamp(min=1), "attention_mask": torch.ones_like(batch["attention_mask"])}
    return batch


@pytest.mark.interpreter
def test_in_the_interpreter() -> None:
    with reexecuted_loop():
        stock, model = both("cpu")
        options = {**padded_batch(3, 5), "adapter_names": NAMES}
        assert torch.equal(run(model, 3, **options), run(stock, 3, **options))
        assert assert_looped(model).adapters_fused


def all_fused(call: Any, device: str) -> bool:
    """Whether the seven projections of both layers were, in every step that ran from Python: on a GPU those of a capture."""
    return call.adapters_fused >= 2 * 7 * (2 if device == "cuda" else NEW - 1)


def check(stock: Any, model: Any, new: int = NEW, **options: Any) -> Any:
    """Stock's tokens, from the device's loop; returns the call's counters."""
    want = run(stock, new, **options)
    assert torch.equal(run(model, new, **options), want)
    assert want[0].tolist() != want[-1].tolist()
    return assert_looped(model)


@pytest.mark.parametrize("padded", [False, True])
def test_an_adapter_for_each_row(device: str, padded: bool) -> None:
    stock, model = both(device)
    batch = rows(padded)
    call = check(stock, model, **batch, adapter_names=NAMES)
    assert call.graphs_captured == 1 and not call.fallbacks and call.prompt_tokens == real_tokens(batch)
    assert all_fused(call, device)
    # The same graph serves every assignment of these adapters to rows.
    call = check(stock, model, **batch, adapter_names=NAMES[::-1])
    assert call.graphs_captured == 0
    assert check(stock, model, **batch, adapter_names=["first", "second", "second"]).graphs_captured == 0
    assert check(stock, model, **batch, adapter_names=["first", "__base__", "third"]).graphs_captured == 1
    # Without names the active adapter again.
    assert check(stock, model, **batch).graphs_captured == 1
    assert check(stock, model, **batch, adapter_names=NAMES).graphs_captured == 0


def test_rows_that_end_take_their_adapters_along(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller step goes on with the rows that are left, and their adapters."""
    monkeypatch.setattr("hf_fastattn.loop.decode_loop.WORTH_CAPTURING", 1)
    stock, model = both(device)
    options = {**rows(True), "adapter_names": NAMES}
    tokens = run(stock, 3 * NEW, **options)[:, 13:].tolist()
    # The first row ends at once, so that all others move.
    end = next(token for token in tokens[0] if token not in tokens[1] + tokens[2])
    call = check(stock, model, 3 * NEW, **options, eos_token_id=end)
    assert call.graphs_captured > 1


def test_weights_and_scales_that_change(device: str) -> None:
    stock, model = both(device)
    batch = rows(False)
    before = run(stock, NEW, **batch, adapter_names=NAMES)
    check(stock, model, **batch, adapter_names=NAMES)
    for each in (stock, model):
        q = each.get_base_model().model.layers[0].self_attn.q_proj
        with torch.no_grad():
            q.lora_B["second"].weight.data.mul_(-2)
            q.lora_A["first"].weight.neg_()
    call = check(stock, model, **batch, adapter_names=NAMES)
    assert call.graphs_captured == 0
    for each in (stock, model):
        each.get_base_model().model.layers[1].mlp.down_proj.scaling["second"] *= 3
    assert check(stock, model, **batch, adapter_names=NAMES).graphs_captured == 1
    assert not torch.equal(run(stock, NEW, **batch, adapter_names=NAMES), before)


@pytest.mark.parametrize("third", [{"r": 126}, {"use_rslora": True}], ids=["wide", "rslora"])
def test_what_no_launch_takes_is_computed_beside_it(device: str, third: dict[str, Any]) -> None:
    """More than 128 ranks on a layer."""
    stock, model = both(device, third=third)
    call = check(stock, model, **rows(True), adapter_names=OTHERS)
    assert call.graphs_captured == 1 and not call.fallbacks and call.adapters_fused
    assert all_fused(call, device) == ("r" not in third)


def hooked(model: Any) -> None:
    q = model.get_base_model().model.layers[0].self_attn.q_proj
    q.lora_A["first"].register_forward_hook(lambda module, given, out: 1.5 * out)


def biased(model: Any) -> None:
    linear = model.get_base_model().model.layers[1].mlp.up_proj.lora_B["first"]
    linear.bias = torch.nn.Parameter(torch.full((linear.out_features,), 0.5, device=linear.weight.device))


def whole_mlp_hooked(model: Any) -> None:
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.register_forward_hook(lambda module, given, out: 1.5 * out)


@pytest.mark.parametrize("change", [hooked, biased, whole_mlp_hooked])
def test_layers_that_are_more_run_as_in_peft(device: str, change: Callable[[Any], None]) -> None:
    stock, model = both(device)
    for each in (stock, model):
        change(each)
    options = {**rows(True), "adapter_names": NAMES}
    assert torch.equal(run(model, NEW, **options), run(stock, NEW, **options))
    call = assert_fast(model, fallbacks=("padding stays",))
    assert call.fast_loops == 0 and call.not_looped


def test_errors_are_pefts(device: str) -> None:
    _, model = both(device)
    with pytest.raises(ValueError, match="number of inputs"):
        run(model, NEW, **rows(True), adapter_names=["first"])
    with pytest.raises(ValueError, match="non-existing"):
        run(model, NEW, **rows(True), adapter_names=["fourth"] * 3)
    model.merge_adapter(["first"])
    with pytest.raises(ValueError, match="merged adapters"):
        run(model, NEW, **rows(True), adapter_names=NAMES)


def test_beams_of_rows_with_adapters(device: str) -> None:
    """The beams of a row have its adapter, in the device's loop; the prompt is computed for each of them."""
    stock, model = both(device)
    options = {**rows(False), "adapter_names": NAMES, "num_beams": 2}
    assert torch.equal(run(model, NEW, **options), run(stock, NEW, **options))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 1 and call.graphs_replayed and not call.uncaptured and not call.not_looped


@pytest.mark.parametrize("names", [["first", "second"], ["third", "second", "first"]])
def test_several_active_adapters(device: str, names: list[str]) -> None:
    stock, model = both(device)
    for each in (stock, model):
        each.base_model.set_adapter(names)
    call = check(stock, model, **rows(True))
    assert call.graphs_captured == 1 and all_fused(call, device)
    for each in (stock, model):
        each.get_base_model().model.layers[1].mlp.down_proj.scaling["second"] *= 3
        with torch.no_grad():
            each.get_base_model().model.layers[0].self_attn.v_proj.lora_B["second"].weight.neg_()
    assert check(stock, model, **rows(True)).graphs_captured == 1
    for each in (stock, model):
        each.set_adapter("first")
    assert check(stock, model, **rows(True)).adapters_fused
