"""Mixtures of experts in captured steps, in the device's loop and Transformers': stock's tokens, and what is not captured.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

import hf_fastattn
from tests.loop.test_decode_loop import assert_looped, run
from tests.tools.models import assert_fast, pair_with_graphs, patch_with_graphs, single, tiny

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, all of 3": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, every second": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3_moe, one dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe, one expert": ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {"num_experts": 6, "mlp_only_layers": [0]}),
}
NEW = 12
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one row": single(),
    "samples of one prompt": {**single(), "do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
}


pytestmark = pytest.mark.usefixtures("device")


def both(name: str, device: str, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    family, over = MIXTURES[name]
    stock, model = pair_with_graphs(family, options, **over)
    return stock.to(device), model.to(device)


@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_equal_stock(name: str, device: str) -> None:
    stock, model = both(name, device, {"sampling": "transformers"})
    for call, kwargs in CALLS.items():
        assert torch.equal(run(model, NEW, **kwargs), run(stock, NEW, **kwargs)), call
        counters = assert_fast(model)
        assert not counters.uncaptured and counters.graphs_replayed >= NEW - 2, call
        assert counters.fast_loops == (call in ("greedy", "one row", "beams")), call


@pytest.mark.parametrize("family", ["qwen3_omni_moe"])
def test_tokens_of_models_whose_loop_is_transformers_own(family: str, device: str) -> None:
    stock, model = pair_with_graphs(family, {"sampling": "transformers"})
    stock, model = stock.to(device), model.to(device)
    for call, kwargs in CALLS.items():
        assert torch.equal(run(model, NEW, **kwargs), run(stock, NEW, **kwargs)), call
        counters = assert_fast(model)
        assert not counters.fast_loops and not counters.uncaptured, call


def towards(model: Any, experts: list[int]) -> Any:
    """The model, all of whose tokens go to these experts, in all layers; the other experts hold NaN."""
    with torch.no_grad():
        # Larger than whatever layers add to it.
        model.get_input_embeddings().weight[:, 0] = 100.0
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            for place, expert in enumerate(experts):
                layer.mlp.gate.weight[expert, 0] = 2.0 - place / 8
            left_out = [expert for expert in range(layer.mlp.gate.num_experts) if expert not in experts]
            layer.mlp.experts.gate_up_proj[left_out] = torch.nan
            layer.mlp.experts.down_proj[left_out] = torch.nan
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_all_tokens_to_the_same_experts_and_nan_in_the_others(family: str, device: str) -> None:
    count = {"num_local_experts" if family == "mixtral" else "num_experts": 7}
    for experts in ([4], [5, 2]):
        over = {**count, "num_experts_per_tok": len(experts)}
        stock, model = tiny(family, **over), patch_with_graphs(tiny(family, **over))
        for one in (stock, model):
            towards(one.to(device), experts)
            if device == "cpu":
                one.set_experts_implementation("eager")
        for call, kwargs in {"greedy": {}, "one row": single(), "beams": {"num_beams": 3}}.items():
            want = run(stock, NEW, **kwargs)
            assert torch.equal(run(model, NEW, **kwargs), want) and len(want.unique()) > 8, (experts, call)
            assert_looped(model)
        scores = run(model, 2, output_logits=True, return_dict_in_generate=True).logits
        assert all(part.isfinite().all() for part in scores)


def test_draws_on_the_device(device: str) -> None:
    _, model = both("qwen3_moe", device)
    run(model, NEW, do_sample=True, num_return_sequences=2)
    assert_looped(model)


def _eager(model: Any) -> None:
    model.set_experts_implementation("eager")


def _batched(model: Any) -> None:
    model.set_experts_implementation("batched_mm")


@pytest.mark.parametrize("choose", [_eager, _batched])
def test_any_implementation_of_transformers(choose: Callable[[Any], None], device: str) -> None:
    stock, model = both("qwen3_moe", device)
    for one in (stock, model):
        choose(one)
    before = model.config._experts_implementation
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert_looped(model)
    assert model.config._experts_implementation == before == stock.config._experts_implementation


def _halved(self: Any, *args: Any) -> torch.Tensor:
    return 0.5 * batched_mm_experts_forward(self, *args)


def _own_function(model: Any) -> None:
    model.config._experts_implementation_internal = "halved"


def _hook(model: Any) -> None:
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, given, out: (out[0], 0.5 * out[1], out[2]))


def _other_activation(model: Any) -> None:
    model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()


def _parameter_more(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(7, 64, device=model.device))


@pytest.mark.parametrize("change", [_own_function, _hook])
def test_what_is_not_transformers_own_is_not_captured(
    change: Callable[[Any], None], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed between calls: steps that were captured before are not replayed."""
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "halved", _halved)
    stock, model = both("qwen3_moe", device)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    assert_looped(model)
    for one in (stock, model):
        change(one)
    assert torch.equal(run(model, NEW), run(stock, NEW))
    call = hf_fastattn.report(model).last_call
    assert call.graphs_replayed == 0 and call.not_looped and not call.fast_loops


@pytest.mark.parametrize("change", [_other_activation, _parameter_more])
def test_blocks_that_are_called_are_captured(change: Callable[[Any], None], device: str) -> None:
    """As `batched_mm` computes them, the switch to which is neither undone nor made for good."""
    stock, model = both("qwen3_moe", device)
    for one in (stock, model):
        change(one)
    before = model.config._experts_implementation
    for _ in range(2):
        assert torch.equal(run(model, NEW), run(stock, NEW))
        assert_looped(model)
    assert torch.equal(run(model, NEW, num_beams=2), run(stock, NEW, num_beams=2))
    assert_looped(model)
    # In Transformers' own loop too; prompts are not recorded there.
    own = {"logits_processor": [lambda ids, scores: scores / 2]}
    for _ in range(3):
        assert torch.equal(run(model, NEW, **own), run(stock, NEW, **own))
    call = assert_fast(model)
    assert call.graphs_replayed >= NEW - 2 and not call.uncaptured and not call.appends_replayed
    assert model.config._experts_implementation == before


def test_under_autocast_blocks_are_called_and_captured(device: str) -> None:
    model = both("qwen3_moe", device)[1]
    with torch.autocast(device, torch.bfloat16):
        tokens = [run(model, NEW) for _ in range(2)]
        assert_looped(model)
        assert torch.equal(*tokens)
        # Launched layer by layer they are the same, but where a GPU adds up in another order.
        layered = hf_fastattn.patch(tiny("qwen3_moe", **MIXTURES["qwen3_moe"][1]).to(device), cuda_graphs=False)
        assert device != "cpu" or torch.equal(run(layered, NEW), tokens[0])


@pytest.mark.parametrize(
    ("targets", "captured"),
    [
        ({"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []}, False),
        ({"target_modules": ["q_proj"]}, True),
    ],
)
def test_adapters(targets: dict[str, Any], captured: bool, device: str) -> None:
    """On the experts they are PEFT's to compute; elsewhere they change nothing of this."""

    def make() -> Any:
        torch.manual_seed(3)
        return get_peft_model(tiny("qwen3_moe"), LoraConfig(r=4, init_lora_weights=False, **targets)).eval().to(device)

    stock, model = make(), patch_with_graphs(make())
    assert torch.equal(run(model, NEW), run(stock, NEW))
    call = hf_fastattn.report(model).last_call
    assert call.graphs_replayed == (NEW - 1 if captured else 0) and not call.fallbacks
    assert captured or "mixture" in str(call.uncaptured)


def test_router_logits_are_transformers_own(device: str) -> None:
    stock, model = both("mixtral", device)
    for one in (stock, model):
        one.config.output_router_logits = True
    # With padding Transformers fails in steps.
    assert torch.equal(run(model, NEW, **single()), run(stock, NEW, **single()))
    assert "router logits" in str(hf_fastattn.report(model).last_call.fallbacks)


def test_jitter_in_train_mode_is_not_captured(device: str) -> None:
    model = patch_with_graphs(tiny("mixtral", router_jitter_noise=0.1).to(device))
    run(model, NEW)
    assert_looped(model)
    model.train()
    run(model, NEW)
    assert hf_fastattn.report(model).last_call.graphs_replayed == 0
