"""`attn_implementation="fastattn"`: models without a family of ours give stock's outputs, and our kernels computed them."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, StaticCache

import hf_fastattn
from hf_fastattn import dense_attention, interface
from hf_fastattn.causal_layout import CausalLayout, layout_of
from hf_fastattn.interface import attention_forward, attention_mask, counters
from tests.models import COMMON, OLD, VOCAB, WINDOW, image_batch, noisy, padded_batch, tiny

# (name of the classes without Config and ForCausalLM, what differs from COMMON, stock's attention)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "sdpa"),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
        "eager",
    ),
    "gpt_oss": (
        "GptOss",
        {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
        "eager",
    ),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": WINDOW}, "sdpa"),
    "granite": ("Granite", {"attention_multiplier": 0.3}, "sdpa"),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW}, "sdpa"),
    "olmo2": ("Olmo2", {"num_key_value_heads": 1}, "sdpa"),
}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "samples": {"do_sample": True, "temperature": 2.0, "top_k": 0, "num_return_sequences": 2},
    "no_cache": {"do_sample": False, "use_cache": False},
}
NEW = 24


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registered for the length of a test, with counters at zero."""
    hf_fastattn.register()
    counters.reset()
    yield
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop("fastattn")


def build(name: str, **over: Any) -> Any:
    classes, special, stock = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{classes}Config")(**{**COMMON, **special, **over})
        model = getattr(transformers, f"{classes}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation(stock)
    return model


def build_pair(name: str, **over: Any) -> tuple[Any, Any]:
    """(stock model, one on our attention) of the same weights."""
    stock = build(name, **over)
    model = copy.deepcopy(stock)
    model.set_attn_implementation("fastattn")
    return stock, model


def tokens(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**batch, **{"max_new_tokens": NEW, "do_sample": False, **options})


def assert_ours(calls: int | None = None, backend: str = "reference", fallbacks: int = 0) -> None:
    """Our kernels ran `calls` times, and Transformers' attention `fallbacks` times."""
    assert set(counters.kernels) == {backend} and counters.kernels[backend] > 0, counters
    assert sum(counters.fallbacks.values()) == fallbacks, counters
    assert calls is None or counters.kernels[backend] == calls, counters


# ---- registration -------------------------------------------------------------------------------------------------


def test_import_registers_nothing_and_transformers_says_so() -> None:
    script = """
import hf_fastattn, transformers
from transformers import AttentionInterface, AttentionMaskInterface
assert "fastattn" not in AttentionInterface().valid_keys()
assert "fastattn" not in AttentionMaskInterface().valid_keys()
config = transformers.LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1)
try:
    transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
except ValueError as error:
    assert "fastattn" in str(error)
else:
    raise AssertionError("no error")
assert hf_fastattn.register() is None and hf_fastattn.register() is None
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
assert model.config._attn_implementation == "fastattn"
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_every_way_to_ask_for_it(tmp_path: Path) -> None:
    stock = build("llama")
    want = tokens(stock, padded_batch())
    stock.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn")
    made = AutoModelForCausalLM.from_config(copy.deepcopy(stock.config), attn_implementation="fastattn").eval()
    made.load_state_dict(stock.state_dict())
    for model in (loaded, made):
        counters.reset()
        assert torch.equal(tokens(model, padded_batch(), pad_token_id=0), want)
        assert_ours(3 * NEW)
        model.set_attn_implementation("sdpa")
        assert torch.equal(tokens(model, padded_batch(), pad_token_id=0), want)
        assert_ours(3 * NEW)


@pytest.mark.parametrize("classes", ["CodeGen", "Bloom", "Mpt"])
def test_a_model_without_the_interface_is_refused(classes: str) -> None:
    sizes = {"n_embd": 32, "hidden_size": 32, "d_model": 32, "n_head": 4, "n_heads": 4, "n_layer": 1, "n_layers": 1}
    config = getattr(transformers, f"{classes}Config")(vocab_size=VOCAB, rotary_dim=8, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    with pytest.raises(ValueError, match=f"{classes}Config do not call"):
        model(padded_batch(1)["input_ids"])


# ---- the same outputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_stock(name: str, call: str) -> None:
    stock, model = build_pair(name)
    want = tokens(stock, padded_batch(), **CALLS[call])
    assert not sum(counters.kernels.values())
    assert torch.equal(tokens(model, padded_batch(), **CALLS[call]), want)
    assert_ours(3 * NEW)


@pytest.mark.parametrize("family, layers", [("qwen2_moe", 3), ("qwen3_next", 2), ("ministral3", 3), ("mistral_window", 3)])
def test_windows_experts_and_linear_layers(family: str, layers: int) -> None:
    stock, model = tiny(family), tiny(family)
    model.set_attn_implementation("fastattn")
    assert torch.equal(tokens(model, padded_batch()), tokens(stock, padded_batch()))
    assert_ours(layers * NEW)


def test_a_patched_model() -> None:
    stock, model = build_pair("llama")
    hf_fastattn.patch(model)
    want = tokens(stock, padded_batch())
    assert torch.equal(tokens(model, padded_batch()), want)
    assert not counters.kernels and not counters.fallbacks
    hf_fastattn.unpatch(model)
    assert torch.equal(tokens(model, padded_batch()), want)
    assert_ours(3 * NEW)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_other_loops(name: str) -> None:
    stock, model = build_pair(name)
    batch, one = padded_batch(), {"input_ids": padded_batch(1, 50)["input_ids"]}
    assistant = noisy(copy.deepcopy(stock))
    for inputs, options in (
        (one, {}),
        (batch, {"prefill_chunk_size": 7}),
        (one, {"prompt_lookup_num_tokens": 3}),
        (one, {"assistant_model": assistant}),
    ):
        if OLD and name != "llama" and inputs is one and options:
            # Stock loses keys, or fails, when it crops a full window.
            continue
        want = tokens(stock, inputs, **options)
        counters.reset()
        assert torch.equal(tokens(model, inputs, **options), want), options
        assert_ours()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
@pytest.mark.parametrize("length", [12, 37])
def test_static_cache(name: str, length: int) -> None:
    stock, model = build_pair(name)
    batch = padded_batch(3, length)
    want = tokens(stock, batch, cache_implementation="static")
    assert torch.equal(tokens(model, batch, cache_implementation="static"), want)
    # Its decode steps come with a 4-D mask, which says where the cache is filled.
    assert_ours(3, fallbacks=3 * (NEW - 1))
    assert list(counters.fallbacks) == ["a mask that is not plain causal or sliding"]


def test_what_a_static_cache_has_room_for_is_not_read() -> None:
    stock, model = build_pair("llama")
    ids = padded_batch(2, 20)["input_ids"]
    with torch.no_grad():
        want = stock(ids).logits
        cache = StaticCache(config=model.config, max_cache_len=64)
        first = model(ids[:, :11], past_key_values=cache).logits
        for layer in cache.layers:
            layer.keys[:, :, 11:] = math.nan
            layer.values[:, :, 11:] = math.nan
        rest = model(ids[:, 11:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, rest), 1), want, atol=1e-3, rtol=1e-4)
    assert_ours(6)


@pytest.mark.parametrize(
    "fault",
    ["window + 1", "window - 1", "one more key", "one key less", "no softcap", "no sinks", "scale"],
)
def test_the_models_would_notice(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, model = build_pair({"no softcap": "gemma2", "no sinks": "gpt_oss"}.get(fault, "phi3"))

    def faulty(q: Tensor, k: Tensor, v: Tensor, layout: CausalLayout, *, scale: float, **options: Any) -> Tensor:
        wider = {"window + 1": 1, "window - 1": -1}.get(fault, 0)
        shift = {"one more key": -1, "one key less": 1}.get(fault, 0)
        starts = (layout.starts + shift * (layout.starts > 0)).int()
        window = None if layout.window is None else layout.window + wider
        layout = CausalLayout(starts, layout.padded, layout.filled, layout.kv_length, window)
        drop = {"no softcap": "softcap", "no sinks": "sinks"}.get(fault)
        options = {name: None if name == drop else value for name, value in options.items()}
        return right(q, k, v, layout, scale=scale * (1.1 if fault == "scale" else 1), **options)

    right = interface.dense_attention
    monkeypatch.setattr(interface, "dense_attention", faulty)
    assert not torch.equal(tokens(model, padded_batch()), tokens(stock, padded_batch()))


def test_the_layout_is_made_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = CausalLayout.plan

    def counted(self: CausalLayout, queries: int, row_step: int) -> Any:
        found = plan(self, queries, row_step)
        made.append(found)
        return found

    monkeypatch.setattr(CausalLayout, "plan", counted)
    _, model = build_pair("gpt_oss", num_hidden_layers=6)
    tokens(model, padded_batch(), max_new_tokens=5)
    # One for the full and one for the sliding layers.
    assert len(made) == 6 * 5 and len({id(found) for found in made}) == 2 * 5


# ---- what Transformers computes -----------------------------------------------------------------------------------


def logits_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(**batch).logits * batch["attention_mask"][..., None]
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    stock, model = build_pair(name)
    want, ours = (logits_and_gradients(m, padded_batch()) for m in (stock, model))
    torch.testing.assert_close(ours, want, atol=1e-3, rtol=1e-3)
    assert not counters.kernels and counters.fallbacks == {"gradients are needed": 3}
    with torch.no_grad():
        model.train()(**padded_batch())
    assert_ours(3, fallbacks=3)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
@pytest.mark.parametrize("kind", ["right", "holes"])
def test_padding_that_is_not_on_the_left(name: str, kind: str) -> None:
    stock, model = build_pair(name)
    batch = padded_batch()
    mask = batch["attention_mask"].flip(1) if kind == "right" else torch.ones_like(batch["attention_mask"])
    mask[0, 20:23] = 0
    with torch.no_grad():
        want, ours = (m(input_ids=batch["input_ids"], attention_mask=mask).logits for m in (stock, model))
    torch.testing.assert_close(ours * mask[..., None], want * mask[..., None], atol=1e-3, rtol=1e-4)
    assert not counters.kernels and counters.fallbacks == {"a mask that is not plain causal or sliding": 3}


def test_mask_of_four_dimensions() -> None:
    stock, model = build_pair("llama")
    ids = padded_batch(2, 9)["input_ids"]
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    with torch.no_grad():
        want, ours = (m(input_ids=ids, attention_mask=mask).logits for m in (stock, model))
    assert torch.equal(ours, want)
    assert not counters.kernels


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_sequences(name: str) -> None:
    stock, model = build_pair(name)
    ids = padded_batch(1, 30)["input_ids"]
    positions = torch.cat((torch.arange(13), torch.arange(17)))[None]
    with torch.no_grad():
        want, ours = (m(input_ids=ids, position_ids=positions, use_cache=False).logits for m in (stock, model))
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)
    assert not counters.kernels


def test_chunks() -> None:
    special = {"attention_chunk_size": 16, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**{**COMMON, **special, "pad_token_id": 0})
    torch.manual_seed(0)
    stock = transformers.Llama4ForCausalLM(config).eval()
    model = copy.deepcopy(stock)
    model.set_attn_implementation("fastattn")
    assert torch.equal(tokens(model, padded_batch()), tokens(stock, padded_batch()))
    assert counters.fallbacks


def test_attention_weights() -> None:
    stock, model = build_pair("gpt_oss")
    with torch.no_grad():
        want = stock(**padded_batch(), output_attentions=True).attentions
        ours = model(**padded_batch(), output_attentions=True).attentions
    real = padded_batch()["attention_mask"].bool()
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-4, rtol=1e-4)
    assert counters.fallbacks == {"output_attentions": 3}


def test_dropout_in_training() -> None:
    _, model = build_pair("llama", attention_dropout=0.5)
    with torch.no_grad():
        model.train()(**padded_batch())
    assert not counters.kernels and counters.fallbacks == {"dropout": 3}


def test_vision_tower() -> None:
    stock, model = (tiny("qwen2_5_vl") for _ in range(2))
    model.set_attn_implementation("fastattn")
    assert torch.equal(tokens(model, image_batch()), tokens(stock, image_batch()))
    # Three layers of text a token; the tower sees both ways.
    assert counters.kernels == {"reference": 3 * NEW}
    assert set(counters.fallbacks) == {"is_causal=False"}


def test_encoder_and_decoder() -> None:
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, pad_token_id=0,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.3, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=None, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = transformers.BartForConditionalGeneration(config).eval()
    model = copy.deepcopy(stock)
    model.set_attn_implementation("fastattn")
    for options in ({}, {"num_beams": 2}):
        assert torch.equal(tokens(model, padded_batch(), **options), tokens(stock, padded_batch(), **options))
    assert counters.kernels["reference"] >= 2 * 2 * NEW


def test_compiled_model() -> None:
    stock, model = build_pair("phi3")
    batch = padded_batch()
    with torch.no_grad():
        want = stock(**batch).logits
        ours = torch.compile(model, backend="eager")(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], want[real], atol=1e-3, rtol=1e-4)


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    interface._log.cache_clear()
    _, model = build_pair("llama")
    with caplog.at_level(logging.WARNING, logger="hf_fastattn"):
        model(**padded_batch())
    assert [record.message for record in caplog.records if record.name == "hf_fastattn"] == [
        "attn_implementation='fastattn' runs Transformers' own attention: gradients are needed"
    ]


# ---- the attention function ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """Dense inputs with NaN in all that must not be read, and the same in fp64 without padding, row by row."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    starts: list[int]
    filled: int


def make_case(
    queries: int = 5, filled: int = 40, room: int = 3, window: int | None = None, groups: int = 2, layout: str = "BGLD"
) -> Case:
    """Rows with left padding of 0, 7 and all but two keys, and `room` keys that hold no token yet."""
    generator = torch.Generator().manual_seed(queries)
    starts = [0, 7, filled - 2]
    order = {"BGLD": (0, 1, 2, 3), "BLGD": (0, 2, 1, 3), "GBLD": (1, 0, 2, 3)}[layout]
    q = torch.randn(3, queries, 4, 16, generator=generator).transpose(1, 2)
    shape = [(3, groups, filled + room, 16)[i] for i in order]
    k, v = (torch.randn(shape, generator=generator).permute([order.index(i) for i in range(4)]) for _ in range(2))
    real = torch.arange(filled) >= torch.tensor(starts)[:, None]
    for tensor in (k, v):
        tensor[:, :, filled:] = math.nan
        tensor.transpose(1, 2)[:, :filled][~real] = math.nan
    config = type("Config", (), {"sliding_window": window})
    offset = filled - queries
    mask = attention_mask(3, queries, filled + room, q_offset=offset, attention_mask=real, local_size=window, config=config)
    assert mask is not None and layout_of(mask) is not None
    return Case(q, k, v, mask, starts, filled)


def oracle(case: Case, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """`[B, S, H, D]` in fp64 by the definition; zero for padding."""
    rows, heads, queries, dim = case.q.shape
    out = torch.zeros(rows, queries, heads, dim, dtype=torch.float64)
    ratio = heads // case.k.shape[1]
    for b, start in enumerate(case.starts):
        for i in range(queries):
            at = case.filled - queries + i
            lo = start if window is None else max(start, at - window + 1)
            for h in range(heads if at >= start else 0):
                scores = case.k[b, h // ratio, lo : at + 1].double() @ case.q[b, h, i].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].double()))
                weights = scores.softmax(0)[: at + 1 - lo]
                out[b, i, h] = weights @ case.v[b, h // ratio, lo : at + 1].double()
    return out


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "one query": {"queries": 1},
    "one query, window, sinks": {"queries": 1, "window": 6, "sinks": True},
    "all queries": {"queries": 40, "window": 6},
    "all queries, long": {"queries": 90, "filled": 90, "window": 30},
    "few keys": {"queries": 3, "filled": 5, "room": 0},
    "tokens before heads": {"layout": "BLGD"},
    "heads before rows": {"layout": "GBLD"},
    "one key head": {"groups": 1},
    "other strides of the values": {"other": True},
}


def check_case(backend: str, sinks: bool = False, softcap: float | None = None, other: bool = False, **shape: Any) -> None:
    case, window = make_case(**shape), shape.get("window")
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1)) if sinks else None
    value = case.v.transpose(1, 2).contiguous().transpose(1, 2) if other else case.v
    with torch.no_grad():
        out, weights = attention_forward(
            torch.nn.Module(), case.q, case.k, value, case.mask, scaling=0.3, softcap=softcap, s_aux=logits
        )
    assert weights is None
    assert_ours(1, backend)
    torch.testing.assert_close(out.double(), oracle(case, 0.3, window, softcap, logits), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_dense_keys_in_place(name: str) -> None:
    check_case("reference", **OPTIONS[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("name", OPTIONS)
def test_dense_keys_as_pages(name: str) -> None:
    check_case("triton", **OPTIONS[name])


@pytest.mark.interpreter
def test_a_model_on_the_triton_path() -> None:
    stock, model = build_pair("gpt_oss", num_hidden_layers=2)
    options = {"max_new_tokens": 4}
    assert torch.equal(tokens(model, padded_batch(), **options), tokens(stock, padded_batch(), **options))
    assert_ours(2 * 4, "triton")


def test_keys_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    pages = dense_attention._pages

    def recorded(k: Tensor, *args: Any) -> Tensor:
        read.append(k.data_ptr())
        return pages(k, *args)

    monkeypatch.setattr(dense_attention, "_pages", recorded)
    for layout in ("BGLD", "BLGD"):
        case = make_case(layout=layout)
        read.clear()
        attention_forward(torch.nn.Module(), case.q, case.k, case.v, case.mask)
        assert read == [case.k.data_ptr(), case.v.data_ptr()]


@pytest.mark.parametrize("queries", [1, 100])
def test_one_binary_serves_all_lengths(queries: int) -> None:
    pytest.importorskip("triton")
    from tests.triton_tools.fake_driver import fake_driver
    from tests.triton_tools.targets import TARGETS

    q = torch.zeros(2, 8, queries, 64, dtype=torch.bfloat16)
    with fake_driver(TARGETS["sm_90"]) as fake:
        for length in (100, 101, 112, 1024):
            k = torch.zeros(2, 2, length, 64, dtype=torch.bfloat16)
            layout = CausalLayout.unpadded(2, length, q.device)
            dense_attention.dense_attention(q, k, k.clone(), layout, backend="triton", scale=0.1)
        assert len(fake.compiled()) == 1


def module_with(**attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("window", [None, 6])
def test_a_copy_of_the_mask(window: int | None) -> None:
    """As a split model hands out: the layout is lost, and found again."""
    case = make_case(window=window)
    want, _ = attention_forward(torch.nn.Module(), case.q, case.k, case.v, case.mask)
    for module, kwargs in ((module_with(sliding_window=window), {}), (module_with(), {"sliding_window": window})):
        ours, _ = attention_forward(module, case.q, case.k, case.v, case.mask.clone(), **kwargs)
        assert torch.equal(ours, want)
    assert_ours(3)


@pytest.mark.parametrize(
    "reason, change",
    [
        ("is_causal=False", lambda case: {"is_causal": False}),
        ("dropout", lambda case: {"dropout": 0.1}),
        ("scaling or softcap is not a positive number", lambda case: {"scaling": -0.25}),
        ("gradients are needed", lambda case: {"s_aux": torch.zeros(4, requires_grad=True)}),
        ("a padding mask that is not plain left padding of these queries and keys", lambda case: {"rows": 2}),
        ("head dims of keys and values differ", lambda case: {"value": case.v[..., :8]}),
    ],
)
def test_reasons(reason: str, change: Callable[[Case], dict[str, Any]]) -> None:
    case = make_case()
    kwargs = change(case)
    rows = kwargs.pop("rows", 3)
    q, k, v = (t.nan_to_num()[:rows] for t in (case.q, case.k, kwargs.pop("value", case.v)))
    mask = case.mask if rows == 3 else case.mask[:2] & (torch.arange(40) != 20)
    with torch.enable_grad():
        out, _ = attention_forward(module_with(num_key_value_groups=2), q, k, v, mask, **kwargs)
    assert out.shape == (rows, 5, 4, v.shape[-1]) and out.isfinite().all()
    assert not counters.kernels and counters.fallbacks == {reason: 1}


# ---- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_stock_on_a_gpu(name: str, call: str) -> None:
    stock, model = (m.to("cuda") for m in build_pair(name))
    batch = {key: value.to("cuda") for key, value in padded_batch().items()}
    assert torch.equal(tokens(model, batch, **CALLS[call]), tokens(stock, batch, **CALLS[call]))
    assert_ours(3 * NEW, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_16_bits(name: str, dtype: torch.dtype) -> None:
    # At a usual weight scale: at 0.3 the logits of these models overflow what 16 bits can tell apart.
    # Every expert for every token: which ones are chosen may hang on a rounding error.
    over = {"num_experts_per_tok": 4} if name == "gpt_oss" else {}
    stock, model = (m.to("cuda") for m in build_pair(name, initializer_range=0.05, **over))
    batch = {key: value.to("cuda") for key, value in padded_batch(3, 100).items()}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = stock(**batch).logits[real].double()
        plain = copy.deepcopy(stock).to(dtype)(**batch).logits[real].double()
        ours = model.to(dtype)(**batch).logits[real].double()
    assert_ours(3, "triton")
    assert (ours - want).abs().max() <= 2 * (plain - want).abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_dense_keys_as_pages_on_a_gpu(name: str) -> None:
    options = dict(OPTIONS[name])
    sinks, softcap, other = options.pop("sinks", False), options.pop("softcap", None), options.pop("other", False)
    case = make_case(**options)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1)) if sinks else None
    want = oracle(case, 0.3, options.get("window"), softcap, logits)
    layout = layout_of(case.mask)
    assert layout is not None
    layout = CausalLayout(layout.starts.cuda(), True, layout.filled, layout.kv_length, layout.window)
    value = case.v.transpose(1, 2).contiguous().transpose(1, 2) if other else case.v
    out = dense_attention.dense_attention(
        case.q.cuda(), case.k.cuda(), value.cuda(), layout, backend="triton", scale=0.3, softcap=softcap,
        sinks=None if logits is None else logits.cuda(),
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.gpu
def test_heads_that_the_kernels_refuse() -> None:
    stock, model = (m.to("cuda") for m in build_pair("llama", head_dim=12))
    batch = {key: value.to("cuda") for key, value in padded_batch().items()}
    assert torch.equal(tokens(model, batch), tokens(stock, batch))
    assert not counters.kernels and "head dim 12" in next(iter(counters.fallbacks))
