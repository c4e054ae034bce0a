"""What Transformers' server loads is patched inside the block, if it can be."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.cli.serving.model_manager import ModelManager

import hf_fastattn
from hf_fastattn.serving import patch_served
from tests.tools.models import tiny


def test_what_is_loaded_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object, name: str) -> object:
        return tiny(name)

    monkeypatch.setattr(ModelManager, "_load_model", load)
    with patch_served(page_size=32):
        model = ModelManager._load_model(None, "llama")
    assert hf_fastattn.report(model).patched and model._fastattn.runtime.config.page_size == 32
    assert ModelManager._load_model is load and not hf_fastattn.report(load(None, "llama")).patched


def test_what_cannot_be_patched_is_served_as_ever(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    monkeypatch.setattr(ModelManager, "_load_model", lambda self: other)
    with patch_served():
        assert ModelManager._load_model(None) is other
    assert "GPT2LMHeadModel is served unpatched" in caplog.text and "gpt2" in caplog.text
    assert not hasattr(other, "_fastattn")


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(TypeError, match="pagesize"), patch_served(pagesize=32):
        pass
