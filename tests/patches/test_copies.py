"""Copies, pickles and saved files of a patched model are plain models."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
)

import hf_fastattn
from tests.patches.snapshots import UNLIKE, assert_patched_equals, assert_plain, generate
from tests.tools.models import CORE, pair, tiny


@pytest.mark.parametrize("family", UNLIKE)
def test_deepcopy_is_plain(family: str) -> None:
    stock, model = pair(family)
    generate(model)
    twin = copy.deepcopy(model)
    assert_plain(twin, family)
    assert_patched_equals(stock, model)
    assert_patched_equals(stock, hf_fastattn.patch(twin, page_size=4))
    hf_fastattn.unpatch(model)
    assert_patched_equals(stock, twin)


@pytest.mark.parametrize("family", UNLIKE)
def test_pickle_is_plain(family: str) -> None:
    stock, model = pair(family)
    generate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_plain(torch.load(file, weights_only=False), family)
    assert_plain(pickle.loads(pickle.dumps(model)), family)
    assert_patched_equals(stock, model)


@pytest.mark.parametrize("family", CORE)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    stock, model = pair(family)
    generate(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(stock).__name__]
    assert "fastattn" not in json.dumps(config).lower()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) in (LlamaForCausalLM, Qwen2ForCausalLM)
    assert torch.equal(generate(loaded), generate(stock))


def test_a_patched_model_can_be_collected() -> None:
    model = hf_fastattn.patch(tiny("llama"))
    generate(model, return_dict_in_generate=True)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
