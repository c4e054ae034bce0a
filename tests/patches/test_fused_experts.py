"""Mixtures of experts in a decoder's fused layers, in Triton's interpreter: stock's tokens, our launches, what is called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

import hf_fastattn
from hf_fastattn.patches.fused.experts import held_experts, why_not_captured
from hf_fastattn.patches.fused.forward import fused_reason
from tests.kernels.experts.shapes import with_wide_tiles
from tests.tools.fused_layers import assert_logits, steps
from tests.tools.models import VOCAB, assert_fast, padded_batch, tiny

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "initializer_range": 0.1, "intermediate_size": 48}
# Experts that are no power of two, all of them chosen, and layers without any.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    "qwen2_moe": ("qwen2_moe", {"use_sliding_window": False}),
    "qwen2_moe, every second": (
        "qwen2_moe",
        {"use_sliding_window": False, "decoder_sparse_step": 2, "num_hidden_layers": 2},
    ),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3_moe, one dense": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 2}),
}


def build(name: str, **over: Any) -> Any:
    family, special = MIXTURES[name]
    return tiny(family, **{**SMALL, **special, **over})


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    with_wide_tiles(monkeypatch)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the experts' operations are called."""
    from hf_fastattn.patches.fused import mixture

    counts: Counter[str] = Counter()

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (counts.update([name]), operation(*args, **kwargs))[1]

    for name in ("route", "mixture"):
        monkeypatch.setattr(mixture, name, counted(name, getattr(mixture, name)))
    return counts


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MIXTURES)
def test_logits(name: str, launched: Counter[str]) -> None:
    stock, model = build(name), hf_fastattn.patch(build(name))
    # Transformers has no other in fp64, the truth.
    stock.set_experts_implementation("eager")
    assert fused_reason(model.model) is None and why_not_captured(model) is None
    batch = padded_batch(2, 12)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    # A prompt of more tokens than the first kernels take, one token each, two each.
    cuts = [9, 10, 12] if "," not in name else [11, 12]
    outs = steps(model, ids, mask, cuts, hf_fastattn.PagedCache(model.config))
    assert launched == {"route": len(cuts), "mixture": len(cuts)}
    assert not hf_fastattn.report(model).last_call.fallbacks
    assert_logits(name, stock, torch.cat(outs, 1), ids, mask, cuts)


@pytest.mark.interpreter
def test_tokens_of_generate(launched: Counter[str]) -> None:
    stock, model = build("qwen3_moe"), hf_fastattn.patch(build("qwen3_moe"))
    for one in (stock, model):
        one.set_experts_implementation("eager")
    options: dict[str, Any] = {**padded_batch(1, 5), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**options), stock.generate(**options))
    assert_fast(model)
    assert launched["mixture"] == 3 and model.config._experts_implementation == "eager"


def _hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: 0.5 * out)


def _router_hooked(model: Any) -> None:
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, given, out: (out[0], 0.5 * out[1], out[2]))


def _experts_replaced(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    forward = type(experts).forward
    experts.forward = lambda *args: 0.5 * forward(experts, *args)


def _other_activation(model: Any) -> None:
    model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()


def _halved(self: Any, *args: Any) -> torch.Tensor:
    return 0.5 * batched_mm_experts_forward(self, *args)


def _own_implementation(model: Any) -> None:
    model.config._experts_implementation_internal = "halved"


def _own_gate(model: Any) -> None:
    model.model.layers[0].mlp.experts._apply_gate = lambda out: out.chunk(2, -1)[0]


def _noise(model: Any) -> None:
    model.model.layers[0].mlp.jitter_noise = 0.1
    model.train()


def _another_dtype(model: Any) -> None:
    model.model.layers[0].mlp.experts.bfloat16()


def _transposed(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data = experts.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)


CHANGES = [
    _hooked, _router_hooked, _experts_replaced, _other_activation, _own_implementation, _own_gate, _noise, _another_dtype,
    _transposed,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_transformers_own_is_not_held(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "halved", _halved)
    model = hf_fastattn.patch(build("qwen3_moe"))
    names, device = model._fastattn.family.layers, torch.device("cpu")
    blocks = [layer.mlp for layer in model.model.layers]
    assert why_not_captured(model) is None
    assert all(held_experts(block, names, device, torch.float32) is not None for block in blocks)
    change(model)
    assert why_not_captured(model) is not None
    assert any(held_experts(block, names, device, torch.float32) is None for block in blocks)


@pytest.mark.interpreter
def test_one_block_is_called_and_the_others_are_not(launched: Counter[str]) -> None:
    stock, model = (build("qwen3_moe", num_hidden_layers=2) for _ in range(2))
    model = hf_fastattn.patch(model)
    for one in (stock, model):
        one.set_experts_implementation("eager")
        _router_hooked(one)
    ids = torch.randint(1, VOCAB, (1, 6), generator=torch.Generator().manual_seed(2))
    out = steps(model, ids, None, [5, 6], hf_fastattn.PagedCache(model.config))
    assert_logits("changed", stock, torch.cat(out, 1), ids, None, [5, 6])
    assert launched["mixture"] == 2


@pytest.mark.interpreter
def test_the_first_of_equal_experts() -> None:
    """Planted ties: experts with equal logits, of which only the first that are chosen compute anything."""
    for name in ("mixtral", "qwen2_moe", "qwen3_moe"):
        model = hf_fastattn.patch(build(name, num_hidden_layers=1, num_experts_per_tok=2))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[:] = layer.mlp.gate.weight[0]
                layer.mlp.experts.gate_up_proj[2:] = torch.nan
                layer.mlp.experts.down_proj[2:] = torch.nan
        ids = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(2))
        logits = steps(model, ids, None, [5, 6], hf_fastattn.PagedCache(model.config))
        assert all(part.isfinite().all() for part in logits), name


@pytest.mark.interpreter
def test_narrow_weights_and_autocast(launched: Counter[str]) -> None:
    model = hf_fastattn.patch(build("qwen3_moe", num_hidden_layers=1).bfloat16())
    ids = torch.randint(1, VOCAB, (1, 6), generator=torch.Generator().manual_seed(2))
    out = steps(model, ids, None, [6], hf_fastattn.PagedCache(model.config))[0]
    assert out.dtype is torch.bfloat16 and out.isfinite().all() and launched["mixture"] == 1
    stock, wide = (build("qwen3_moe", num_hidden_layers=1) for _ in range(2))
    wide = hf_fastattn.patch(wide)
    launched.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = stock(ids).logits, wide(ids, use_cache=True).logits
        assert why_not_captured(wide) is not None
    assert not launched and (got - want).abs().max() < 0.1 * want.abs().max()
