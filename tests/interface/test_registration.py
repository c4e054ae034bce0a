"""Registering, every way to ask for `attn_implementation="fastattn"`, and models it is not for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_fastattn.interface import counters
from tests.interface.tiny import NEW, assert_ours, build, tokens
from tests.tools.fresh import fresh
from tests.tools.models import VOCAB, padded_batch


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
    assert fresh(script) == ""


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


@pytest.mark.parametrize("classes", ["Bloom", "Mpt"])
def test_a_model_without_the_interface_is_refused(classes: str) -> None:
    sizes = {"n_embd": 32, "hidden_size": 32, "d_model": 32, "n_head": 4, "n_heads": 4, "n_layer": 1, "n_layers": 1}
    config = getattr(transformers, f"{classes}Config")(vocab_size=VOCAB, rotary_dim=8, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    with pytest.raises(ValueError, match=f"{classes}Config do not call"):
        model(padded_batch(1)["input_ids"])
