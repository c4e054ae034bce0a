"""Models of known shapes with random weights, for measurements where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_fastattn.eval.choices import SHAPES


def random_model(shape: str, device: str | torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A model of one of `SHAPES`, built on the device, with so many layers if they are given.

    Raises:
        ValueError: the shape is unknown.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown; choose one of {sorted(SHAPES)}")
    entries = dict(SHAPES[shape])
    if layers is not None:
        entries["num_hidden_layers"] = layers
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
