"""Mistral and its relatives: Llama with sliding windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.patches.family import Family, like_llama, with_experts


def query_scale(config: Any, position_ids: Tensor) -> Tensor:
    """`1 + beta * log(1 + floor(position / original length))`, of the shape of `position_ids`, fp32."""
    rope = config.rope_parameters
    beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return 1 + beta * torch.log(1 + torch.floor(position_ids / length))


FAMILIES = (
    # Mistral (Jiang et al., 2023): a sliding window in every layer, if the configuration has one.
    Family(
        model_type="mistral",
        decoder="MistralModel",
        attention="MistralAttention",
        layers=like_llama("Mistral"),
        causal_lm="MistralForCausalLM",
    ),
    # Ministral: full and sliding-window layers mixed, as `layer_types` says.
    Family(
        model_type="ministral",
        decoder="MinistralModel",
        attention="MinistralAttention",
        layers=like_llama("Ministral"),
        causal_lm="MinistralForCausalLM",
    ),
    # Ministral 3: queries grow with the logarithm of their position, as in Llama 4.
    Family(
        model_type="ministral3",
        decoder="Ministral3Model",
        attention="Ministral3Attention",
        layers=like_llama("Ministral3"),
        causal_lm="Ministral3ForCausalLM",
        query_scale=query_scale,
    ),
    # Mixtral (Jiang et al., 2024): experts instead of the feed-forward layers.
    Family(
        model_type="mixtral",
        decoder="MixtralModel",
        attention="MixtralAttention",
        layers=with_experts("Mixtral", rounds_weights=False, dense=False),
        causal_lm="MixtralForCausalLM",
    ),
)
