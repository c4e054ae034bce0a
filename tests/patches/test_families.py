"""What sets one family apart matters: handled wrongly it changes the tokens, and what a user changed is honoured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hf_fastattn
from hf_fastattn.patches import registry
from hf_fastattn.patches.attention import forward as attention
from hf_fastattn.patches.family import Family
from hf_fastattn.patches.fused.forward import fused_reason
from hf_fastattn.patches.modules.watched import takes_packed_rows
from hf_fastattn.transformers_version import CACHE
from tests.tools.fused_layers import LAYER_COUNT, assert_logits, count_launches, steps
from tests.tools.models import (
    COMMON,
    FAMILIES,
    OLD,
    assert_fast,
    padded_batch,
    pair,
    patch_with_graphs,
    real_tokens,
    single,
    tiny,
)
from tests.tools.reexecuted import reexecuted_loop

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("ministral3", {"query_scale": None}),
    ("qwen3", {"qk_norm": None}),
    ("qwen3_moe", {"qk_norm": None}),
    ("qwen3_vl", {"qk_norm": None}),
    ("qwen3_next", {"qk_norm": None}),
    ("qwen3_next", {"unit_offset": False}),
    ("qwen3_5", {"unit_offset": False}),
    ("smollm3", {"rotates": None}),
    ("smollm3_window", {"rotates": None}),
    ("exaone4", {"rotates": None}),
    ("exaone4", {"qk_norm": None}),
    ("apertus", {"qk_norm": None}),
    ("olmo2", {"projection_norm": False}),
    ("olmo3", {"projection_norm": False}),
]
NORMED = ("qwen3", "qwen3_next")


def generate(model: Any) -> torch.Tensor:
    return model.generate(**padded_batch(), max_new_tokens=20, do_sample=False)


def assert_same(stock: Any, model: Any) -> None:
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model, real_tokens(padded_batch()))


@pytest.mark.parametrize(("family", "entry"), WRONG)
def test_a_wrong_word_in_a_family_file(family: str, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair(family)
    assert_same(stock, model)
    known: Family = model._fastattn.family
    hf_fastattn.unpatch(model)
    monkeypatch.setitem(registry.FAMILIES, known.model_type, replace(known, **entry))
    assert not torch.equal(generate(hf_fastattn.patch(model)), generate(stock))


LOOPED = (
    "apertus",
    "arcee",
    "cwm",
    "exaone",
    "exaone4",
    "jais2",
    "olmo2",
    "olmo3",
    "seed_oss",
    "smollm3_window",
    "starcoder2",
)


@pytest.mark.parametrize("family", [name for name in LOOPED if name in FAMILIES])
def test_the_fast_loop_takes_it(family: str) -> None:
    stock = tiny(family)
    with reexecuted_loop():
        model = patch_with_graphs(tiny(family))
        for call in ({}, {"eos_token_id": list(range(3, 128, 9)), "repetition_penalty": 1.2}):
            options = {**padded_batch(), "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **call}
            assert torch.equal(model.generate(**options), stock.generate(**options))
            assert assert_fast(model, real_tokens(padded_batch())).fast_loops == 1


@pytest.mark.parametrize("family", ["granite", "hyperclovax"])
def test_the_fast_loop_leaves_scaled_logits_alone(family: str) -> None:
    stock = tiny(family)
    with reexecuted_loop():
        model = patch_with_graphs(tiny(family))
        assert_same(stock, model)
        assert hf_fastattn.report(model).last_call.fast_loops == 0


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["arcee", "jais2", "starcoder2"])
def test_fused_layers_call_what_is_not_llamas(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"num_hidden_layers": LAYER_COUNT, "initializer_range": 0.1}
    stock, model = tiny(family, **over), hf_fastattn.patch(tiny(family, **over))
    assert fused_reason(model.model) is None
    ids, mask = padded_batch(3, 12).values()
    launched = count_launches(monkeypatch)
    outs = steps(model, ids, mask, [9, 10, 12], hf_fastattn.PagedCache(model.config))
    # Of the prompt's more than 16 tokens none, then q, k and v, and the output, of two forwards.
    assert launched["matvec"] == 2 * 2 * LAYER_COUNT and not launched["gate_up_silu"]
    assert_logits(family, stock, torch.cat(outs, 1), ids, mask, [9, 10, 12])


@pytest.mark.parametrize("name", ["starcoder2", "seed_oss"])
def test_dropout_of_residuals_falls_back(name: str) -> None:
    """Where it is zero, or not in training, it changes nothing."""
    stock, model = pair(name, attention_dropout=0.0, residual_dropout=0.5)
    assert_same(stock, model)
    results = []
    for side in (stock.train(), model.train()):
        torch.manual_seed(0)
        results.append(side.generate(**padded_batch(), max_new_tokens=4, do_sample=False))
    assert torch.equal(*results)
    assert hf_fastattn.report(model).last_call.fallbacks == {"residual dropout is active": 4}


def test_an_omni_model_is_patched_in_its_thinker() -> None:
    """It generates by its thinker's `generate()`, and goes on from there."""

    thinker = tiny("qwen3_omni_moe")
    config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    whole = transformers.Qwen3OmniMoeForConditionalGeneration(config).eval()
    whole.thinker = thinker
    call = {**padded_batch(), "return_audio": False, "thinker_max_new_tokens": 8, "thinker_do_sample": False}
    expected = whole.generate(**call)[0]
    assert hf_fastattn.patch(whole) is whole
    assert torch.equal(whole.generate(**call)[0], expected)
    assert_fast(whole, real_tokens(padded_batch()))
    hf_fastattn.unpatch(whole)
    assert not hf_fastattn.report(whole).patched and type(thinker) is type(tiny("qwen3_omni_moe"))


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_a_gate_that_is_dropped(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = pair(family)
    monkeypatch.setattr(torch, "sigmoid", torch.ones_like)
    ours = generate(model)
    monkeypatch.undo()
    assert not torch.equal(ours, generate(stock))


def test_linear_attention_layers_are_expected_only_where_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.FAMILIES["qwen3_next"]
    monkeypatch.setitem(registry.FAMILIES, "qwen3_next", replace(known, linear_attention=False))
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        hf_fastattn.patch(tiny("qwen3_next"))


@pytest.mark.parametrize("family", NORMED)
def test_hooks_on_norms_are_called(family: str) -> None:
    stock, model = pair(family)
    calls = []
    for side in (stock, model):
        for name, module in side.named_modules():
            if name.endswith("q_norm"):
                module.register_forward_hook(takes_packed_rows(lambda *_, side=side: calls.append(side)))
            if name.endswith("k_norm"):
                module.register_forward_hook(takes_packed_rows(lambda _, __, out: 0.5 * out))
    assert_same(stock, model)
    assert calls.count(model) == calls.count(stock) > 0
    assert not torch.equal(generate(model), generate(tiny(family)))


class Halved(nn.Module):
    """A norm of the user's own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.norm(x)


@pytest.mark.parametrize("family", NORMED)
def test_replaced_norms_are_called(family: str) -> None:
    stock, model = pair(family)
    for side in (stock, model):
        for module in list(side.modules()):
            if hasattr(module, "k_norm"):
                module.k_norm = Halved(module.k_norm)
    assert torch.equal(generate(model), generate(stock))
    assert_fast(model, fallbacks=("Halved may look at the whole batch",))
    assert not torch.equal(generate(model), generate(tiny(family)))


@pytest.mark.parametrize("family", NORMED)
def test_norms_of_different_eps(family: str) -> None:
    stock, model = pair(family)
    for side in (stock, model):
        for name, module in side.named_modules():
            if name.endswith("k_norm"):
                setattr(module, "eps" if hasattr(module, "eps") else "variance_epsilon", 3.0)
    assert_same(stock, model)
    assert not torch.equal(generate(model), generate(tiny(family)))


def test_plain_norms_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_fastattn.patch(tiny("qwen3"))
    seen = []
    normalise = attention.normalise

    def watch(*args: Any) -> Any:
        seen.append(normalise(*args))
        return seen[-1]

    monkeypatch.setattr(attention, "normalise", watch)
    generate(model)
    assert seen and all(arguments["q_norm"] is not None for _, _, arguments in seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NORMED)
def test_logits_are_those_of_stock(family: str, dtype: torch.dtype) -> None:
    """In bfloat16 to its rounding: the norm's products are rounded where Transformers rounds them."""
    stock, model = tiny(family).to(dtype), hf_fastattn.patch(tiny(family).to(dtype))
    ids = padded_batch(1)["input_ids"]
    with torch.no_grad():
        exact = tiny(family)(ids).logits
        expected = stock(ids).logits.float()
        ours = model(ids, **{CACHE: hf_fastattn.PagedCache(model.config)}).logits.float()
    assert_fast(model, held=None)
    allowed = 2 * (expected - exact).abs().max() + 1e-4
    assert (ours - exact).abs().max() <= allowed


@pytest.mark.parametrize("output", ["argument", "config"])
def test_router_logits_fall_back(output: str) -> None:
    stock, model = pair("mixtral")
    batch = padded_batch()
    asked = {"output_router_logits": True} if output == "argument" else {}
    for side in (stock, model):
        side.config.output_router_logits = output == "config"
    with torch.no_grad():
        expected = stock(**batch, **asked).router_logits
        ours = model(**batch, **asked, **{CACHE: hf_fastattn.PagedCache(model.config)}).router_logits
    assert len(ours) == len(expected) == 3
    real = batch["attention_mask"].bool().flatten()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=1e-3, atol=1e-3)
    assert "router logits" in str(hf_fastattn.report(model))


@pytest.mark.skipif(OLD, reason="stock fails in this version")
def test_samples_with_router_logits() -> None:
    """The forward's outputs are then not all by row."""
    stock, model = pair("qwen3_moe")
    tokens = []
    for side in (stock, model):
        side.config.output_router_logits = True
        torch.manual_seed(0)
        tokens.append(side.generate(single()["input_ids"], max_new_tokens=8, do_sample=True, num_return_sequences=2))
    assert torch.equal(tokens[1], tokens[0])


MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("Mistral4", "latent", {**MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    ("Llama4", "chunked", {"num_local_experts": 2, "head_dim": 16}),
    ("Gemma2", "no family file", {"head_dim": 16}),
    (
        "Mllama",
        "cross-attention",
        {"num_hidden_layers": 2, "cross_attention_layers": [1], "bos_token_id": 1, "pad_token_id": 0},
    ),
]


@pytest.mark.parametrize(("name", "reason", "special"), REFUSED)
def test_refused_with_a_reason(name: str, reason: str, special: dict[str, Any]) -> None:
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**COMMON, **special}))
    before = {id(module): dict(vars(module)) for module in model.modules()}
    with pytest.raises(ValueError, match=reason):
        hf_fastattn.patch(model)
    assert before == {id(module): dict(vars(module)) for module in model.modules()}


@pytest.mark.parametrize("model_type", ["mistral_large4_text", "qwen4_exp_text", "deepseek_v3", "something_new"])
def test_refused_by_model_type(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){model_type}.*cannot be patched.*supported.*llama"):
        registry.family_of(model_type)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast(family: str) -> None:
    stock, model = pair(family, initializer_range=0.05)
    batch = padded_batch()
    with torch.no_grad():
        exact = stock(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            plain = stock(**batch).logits.float()
            cache = hf_fastattn.PagedCache(model.config)
            ours = model(**batch, **{CACHE: cache}, use_cache=True).logits.float()
    assert_fast(model, held=None)
    seen = batch["attention_mask"].bool()
    assert (ours - exact)[seen].abs().max() <= 2 * (plain - exact)[seen].abs().max()
