"""Fused layers on a CUDA device: fp32 tokens equal to stock, bf16 logits within the error criterion at a real width."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hf_fastattn
from hf_fastattn.patches.fused.forward import fused_logits, fused_reason
from hf_fastattn.transformers_version import CACHE
from tests.tools.fused_layers import FUSED, LAYER_COUNT, count_launches
from tests.tools.models import COMMON, padded_batch, tiny

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Llama-3-8B, but for the depth and the vocabulary.
WIDE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "num_hidden_layers": 2,
    "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return count_launches(monkeypatch)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_equal_stock(name: str, rows: int, launched: Counter[str]) -> None:
    family, over = FUSED[name]
    stock, model = (tiny(family, **{"num_hidden_layers": LAYER_COUNT, **over}).to("cuda") for _ in range(2))
    hf_fastattn.patch(model, cuda_graphs=False)
    assert fused_reason(model.model) is None
    batch = {key: value[:rows].to("cuda") for key, value in padded_batch().items()}
    options = {"max_new_tokens": 48, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), stock.generate(**batch, **options))
    # A prompt of up to 64 tokens takes the same kernel for gate and up as a step.
    assert launched["matvec"] >= 47 * 3 * LAYER_COUNT
    assert launched["gate_up_silu"] + launched["silu_and_mul"] >= 48 * LAYER_COUNT


@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_tokens_equal_stock(rows: int, launched: Counter[str]) -> None:
    stock = tiny("qwen3", num_hidden_layers=LAYER_COUNT).to("cuda")
    model = hf_fastattn.patch(tiny("qwen3", num_hidden_layers=LAYER_COUNT).to("cuda"), cuda_graphs=True)
    batch = {key: value[:rows].to("cuda") for key, value in padded_batch().items()}
    options = {"max_new_tokens": 48, "do_sample": False}
    want = stock.generate(**batch, **options)
    for _ in range(2):
        launched.clear()
        assert torch.equal(model.generate(**batch, **options), want)
        call = hf_fastattn.report(model).last_call
        assert call.graphs_replayed > 0 and not call.uncaptured
        # Prompt, first step, warm-up and capture: replays launch nothing from Python.
        assert launched["gate_up_silu"] < 24 * LAYER_COUNT


@pytest.mark.parametrize("rows", [1, 3])
def test_replayed_tokens_of_lora(rows: int) -> None:
    peft = pytest.importorskip("peft")

    def lora() -> Any:
        torch.manual_seed(4)
        model = tiny("llama", num_hidden_layers=LAYER_COUNT)
        config = peft.LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False)
        return peft.get_peft_model(model, config).eval().to("cuda")

    stock, model = lora(), hf_fastattn.patch(lora(), cuda_graphs=True)
    batch = {key: value[:rows].to("cuda") for key, value in padded_batch().items()}
    options = {"max_new_tokens": 48, "do_sample": False}
    want = stock.generate(**batch, **options)
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **options), want)
        call = hf_fastattn.report(model).last_call
        assert call.graphs_replayed > 0 and not call.uncaptured and not call.fallbacks
        assert call.adapters_fused % (7 * LAYER_COUNT) == 0 and bool(call.adapters_fused) >= bool(call.graphs_captured)
        for each in (stock, model):
            for module in each.modules():
                if isinstance(getattr(module, "scaling", None), dict):
                    module.scaling["default"] *= 0.5
        want = stock.generate(**batch, **options)


@pytest.mark.parametrize("held", [torch.float32, BF16])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_logits_of_lora_in_bf16(wide: tuple[Any, Any, Any], rows: int, held: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=16, target_modules=PROJECTIONS, init_lora_weights=False)
    stock = peft.get_peft_model(copy.deepcopy(wide[1]), config).eval().to("cuda")
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(held) * 0.2
    exact, model = copy.deepcopy(stock).float(), copy.deepcopy(stock)
    hf_fastattn.patch(model, cuda_graphs=False)
    base = model.get_base_model()
    ids = torch.randint(0, WIDE["vocab_size"], (rows, 9), device="cuda", generator=torch.Generator("cuda").manual_seed(rows))
    cache = hf_fastattn.PagedCache(base.config)
    with torch.no_grad():
        parts = [base(ids[:, i : i + 1], **{CACHE: cache}, use_cache=True).logits for i in range(9)]
        _assert_within(torch.cat(parts, 1).double(), stock(ids).logits.double(), exact(ids).logits.double())
    assert base._fastattn.runtime.counters.adapters_fused == 9 * 7 * 2


@pytest.fixture(scope="module")
def wide() -> tuple[Any, Any, Any]:
    """The model in fp32, in bf16, and in bf16 patched; of the same weights, which bf16 holds exactly."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        stock = LlamaForCausalLM(LlamaConfig(**{**COMMON, **WIDE})).to(BF16).eval()
    # The frequencies of RoPE are no weights, and fp32 in a model that was loaded in bf16.
    exact = copy.deepcopy(stock).float()
    for model in (stock, exact):
        rope = model.model.rotary_emb
        rope.inv_freq = type(rope)(model.config).to("cuda").inv_freq.float()
    return exact, stock, hf_fastattn.patch(copy.deepcopy(stock), cuda_graphs=False)


@pytest.mark.parametrize(
    ("rows", "cuts"), [(1, (90, 91, 92)), (4, (20, 21, 24)), (16, (8, 9)), (32, (4, 5, 7)), (2, (700,))]
)
def test_logits_in_bf16(wide: tuple[Any, Any, Any], rows: int, cuts: tuple[int, ...]) -> None:
    exact, stock, model = wide
    ids = torch.randint(
        0, WIDE["vocab_size"], (rows, cuts[-1]), device="cuda", generator=torch.Generator("cuda").manual_seed(rows)
    )
    assert fused_reason(model.model) is None
    with torch.no_grad():
        want = exact(ids).logits.double()
        plain = stock(ids).logits.double()
        cache, parts, begin = hf_fastattn.PagedCache(model.config), [], 0
        for end in cuts:
            parts.append(model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits)
            begin = end
    _assert_within(torch.cat(parts, 1).double(), plain, want)


@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 100])
def test_logits_of_the_head(wide: tuple[Any, Any, Any], tokens: int) -> None:
    exact, stock, _ = wide
    hidden = torch.randn(
        tokens, WIDE["hidden_size"], device="cuda", dtype=BF16, generator=torch.Generator("cuda").manual_seed(1)
    )
    with torch.no_grad():
        want, plain = exact.lm_head(hidden.float()).double(), stock.lm_head(hidden).double()
        _assert_within(fused_logits(stock.lm_head, hidden).double(), plain, want)


def _assert_within(ours: Tensor, plain: Tensor, want: Tensor) -> None:
    error, allowed = (ours - want).abs(), 2 * (plain - want).abs()
    assert error.max() <= allowed.max()
    assert error.mean() <= allowed.mean()
