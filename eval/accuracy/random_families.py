"""Small models of every family of text models that is patched, with random weights that make attention matter.

At Transformers' usual deviation of 0.02 a swapped page would change next to nothing. A name `random:qwen3` stands for one
of these models wherever an evaluation takes a model; its tokenizer is the shipped checkpoint's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

PREFIX = "random:"
LAYERS, WINDOW = 4, 64
COMMON: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEAD: dict[str, Any] = {"head_dim": 64}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
SOME_WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID: dict[str, Any] = {
    **HEAD,
    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
}
QUERY_SCALE: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 16.0,
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": 64,
}
MULTIPLIERS: dict[str, Any] = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.3,
}
# Model type, and what differs from COMMON. A name with a hyphen is the type before it, with windows.
RANDOM: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral-window": {"sliding_window": WINDOW},
    "ministral": {**HEAD, **MIXED},
    "ministral3": {**HEAD, "rope_parameters": QUERY_SCALE, "max_position_embeddings": 1024},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2-window": SOME_WINDOWS,
    "qwen2_moe": EXPERTS,
    "qwen3": HEAD,
    "qwen3-window": {**HEAD, **SOME_WINDOWS},
    "qwen3_moe": {**HEAD, **EXPERTS},
    "qwen3_next": {**HYBRID, **EXPERTS},
    "qwen3_5_text": {
        **HYBRID,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
    "apertus": {},
    "arcee": HEAD,
    "cwm": {**HEAD, **MIXED, "bos_token_id": 1},
    "exaone": {},
    "exaone4": {**HEAD, **MIXED},
    "granite": MULTIPLIERS,
    "hyperclovax": {**MULTIPLIERS, "use_post_norm": True},
    "jais2": HEAD,
    "olmo2": {},
    "olmo3": MIXED,
    "seed_oss": HEAD,
    "smollm3": {"no_rope_layers": [1, 0] * (LAYERS // 2)},
    "starcoder2": {"sliding_window": WINDOW},
}


def is_random(name: str) -> bool:
    """Whether a model's name stands for one of these."""
    return name.startswith(PREFIX)


def is_known_here(family: str) -> bool:
    """Whether this release of Transformers has the model type of a family."""
    try:
        AutoConfig.for_model(_model_type(family))
    except ValueError:
        return False
    return True


def random_family(name: str, vocabulary: int, dtype: torch.dtype) -> Any:
    """The model that a name stands for, in eval mode, always with the same weights.

    Args:
        name: `random:FAMILY`.
        vocabulary: tokens that it knows.
        dtype: of the weights.

    Raises:
        ValueError: there is no such family, or not in this release of Transformers.
    """
    family = name.removeprefix(PREFIX)
    if family not in RANDOM or not is_known_here(family):
        known = ", ".join(one for one in RANDOM if is_known_here(one))
        raise ValueError(f"there is no random model {family!r}; the families are {known}")
    config = AutoConfig.for_model(_model_type(family), **{**COMMON, **RANDOM[family], "vocab_size": vocabulary})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # In fp32 first: the weights are the same in every dtype, but for rounding.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def _model_type(family: str) -> str:
    return family.partition("-")[0]
