"""Ministral 3: Mistral whose queries grow with the logarithm of their position, as in Llama 4."""

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.patches.family import Family


def query_scale(config: Any, position_ids: Tensor) -> Tensor:
    """`1 + beta * log(1 + floor(position / original length))`, of the shape of `position_ids`, fp32."""
    rope = config.rope_parameters
    beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return 1 + beta * torch.log(1 + torch.floor(position_ids / length))


MINISTRAL3 = Family(
    model_type="ministral3",
    decoder="Ministral3Model",
    attention="Ministral3Attention",
    query_scale=query_scale,
)
