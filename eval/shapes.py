"""Models of known shapes with random weights, for measurements where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# The configuration that the name stands for, as published; weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


def random_model(shape: str, device: str | torch.device, dtype: torch.dtype) -> Any:
    """A model of one of `SHAPES`, built on the device.

    Raises:
        ValueError: the shape is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown; choose one of {sorted(SHAPES)}")
    entries = dict(SHAPES[shape])
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
