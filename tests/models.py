"""Tiny models that would notice a fault, and the checks that every model test makes.

Untied embeddings, `initializer_range=0.3` and random biases and norms make attention matter: at the usual 0.02 with
tied embeddings even swapped pages leave the greedy tokens as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hf_fastattn

VOCAB = 128
WINDOW = 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
MIXED_WINDOW: dict[str, Any] = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
}
CLASSES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_window": (Qwen2Config, Qwen2ForCausalLM, MIXED_WINDOW),
}
FAMILIES = tuple(CLASSES)


def tiny(family: str, seed: int = 0, **over: Any) -> Any:
    """A model of `family` in eval mode; the same `seed` gives the same weights. `over`: config entries."""
    config_class, model_class, special = CLASSES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**COMMON, **special, **over}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    return model.eval()


def pair(family: str, options: Mapping[str, Any] | None = None, **over: Any) -> tuple[Any, Any]:
    """(stock model, patched model) of the same weights."""
    return tiny(family, **over), hf_fastattn.patch(tiny(family, **over), **(options or {}))


def noisy(model: PreTrainedModel, amount: float = 0.01) -> PreTrainedModel:
    """`model` with its weights moved a little: an assistant that is right only sometimes."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return model


def padded_batch(rows: int = 3, longest: int = 37, seed: int = 1) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[rows, longest]`, left-padded; no two rows of equal length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row * (longest - 9) // max(rows - 1, 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def single(length: int = 37, seed: int = 1) -> dict[str, torch.Tensor]:
    """One row without padding."""
    return padded_batch(1, length, seed)


def real_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of `batch` that are no padding."""
    return int(batch["attention_mask"].sum())


def assert_fast(
    model: Any,
    prompt_tokens: int | None = None,
    shared: bool | None = None,
    fallbacks: tuple[str, ...] = (),
    held: int | None = 0,
) -> Any:
    """Our path did the work of the last call.

    Args:
        prompt_tokens: prompt tokens that it must have computed.
        shared: whether pages must have been shared.
        fallbacks: a word of each expected fallback reason; no other reason may have come up.
        held: pages that may still be held; `None` for any number.
    """
    call = hf_fastattn.report(model).last_call
    assert call is not None and call.forwards > 0
    if not fallbacks:
        assert call.fallbacks == {}
    else:
        assert call.fallbacks
        assert all(any(word in reason for word in fallbacks) for reason in call.fallbacks), call
    if prompt_tokens is not None:
        assert call.prompt_tokens == prompt_tokens
    if shared is not None:
        assert (call.pages_shared > 0) == shared
    if held is not None:
        assert hf_fastattn.report(model).pages_in_use == held
    return call


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny models: token i is one letter."""
    vocab = {chr(i if 33 <= i <= 126 else 256 + i): i for i in range(VOCAB)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
