"""The models of the matrix: random weights, of a size at which launches count on a GPU, and small ones for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

INTERFACE = "fastattn"


@dataclass(frozen=True)
class Size:
    """Sizes of the models and of what they are asked.

    Attributes:
        entries: of every configuration.
        experts: those of a mixture of experts.
        window: keys that a sliding window shows.
        prompt: tokens of a prompt; longer than the window.
        rows: of a batch, samples of a prompt, and equal neighbours of each of two prompts.
    """

    entries: dict[str, Any]
    experts: dict[str, Any]
    window: int
    prompt: int
    rows: int


SIZES = {
    # As Qwen3 0.6B, with fewer layers and a smaller vocabulary.
    "cuda": Size(
        {
            "vocab_size": 32768,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
        window=256,
        prompt=512,
        rows=8,
    ),
    "cpu": Size(
        {
            "vocab_size": 2048,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
        window=48,
        prompt=64,
        rows=4,
    ),
}
FIXED = {"max_position_embeddings": 4096, "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": None}
# What differs between the families: names of fields of `Size` that they take, and entries of their own.
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "llama": ((), {}),
    "qwen2": ((), {}),
    "qwen3": ((), {}),
    "mistral": (("window",), {}),
    "qwen3_moe": (("experts",), {}),
    "qwen3_next": (
        ("experts",),
        {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    ),
    "gemma2": (("window",), {"query_pre_attn_scalar": 64}),
    "phi3": ((), {"pad_token_id": None}),
    "gpt_oss": (("window", "experts"), {"num_local_experts": 4}),
}
# Families that are not patched: the attention implementation of ours is compared with their own.
BY_INTERFACE = ("gemma2", "phi3", "gpt_oss")
# Before 5.24 Transformers' sdpa leaves the softcap out.
STOCKS_ATTENTION = {"gemma2": "eager"}


def build(family: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model in eval mode that never stops by itself."""
    size = SIZES[device.type]
    takes, special = FAMILIES[family]
    entries = {**FIXED, **size.entries, **special, **(size.experts if "experts" in takes else {})}
    if "window" in takes:
        entries["sliding_window"] = size.window
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **entries), dtype=dtype, attn_implementation=STOCKS_ATTENTION.get(family)
        )
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    return model.eval()
