"""Mixtures of experts in captured steps, in the device's loop and Transformers': stock's tokens, and what is not captured.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

import hf_fastattn
from tests.loop.test_decode_loop import assert_looped, run
from tests.tools.models import assert_fast, pair_with_graphs, patch_with_graphs, single, tiny
from tests.tools.reexecuted import reexecuted_loop

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, all of 3": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, every second": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3_moe, one dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3_moe, one expert": ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}),
}
NEW = 12
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one row": single(),
    "samples of one prompt": {**single(), "do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "temperature": 2.0},
    "beams": {"num_beams": 3},
}


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param


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


CHANGES = [_own_function, _hook, _other_activation, _parameter_more]


@pytest.mark.parametrize("change", CHANGES)
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
