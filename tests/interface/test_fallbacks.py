"""What Transformers' own attention computes, with the reason counted and logged once."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_fastattn import interface
from hf_fastattn.interface import counters
from tests.interface.tiny import MODELS, NEW, assert_ours, build_pair, tokens
from tests.tools.models import COMMON, VOCAB, image_batch, padded_batch, tiny


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
