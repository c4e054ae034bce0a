"""The fp32 weights that fused layers multiply with under autocast, of which 16-bit copies are worth making."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.patches.modules.lora_modules import adapted_parameters
from hf_fastattn.patches.modules.product_layers import product_layers


def weights_read(model: Any, dtype: torch.dtype, names: tuple[str, ...] | None = None) -> list[Tensor]:
    """Each once. Layers that are called cast theirs themselves; LoRA's A and B are read as they are.

    Args:
        model: patched, with fused layers.
        dtype: of the products.
        names: adapters that rows choose from, if they do.
    """
    found: dict[int, Tensor] = {}
    for linear in product_layers(model._fastattn.decoder(model), model.device, model.lm_head):
        held = adapted_parameters(linear, model.device, (dtype, torch.float32), names)
        if held is not None and held.weight.dtype is torch.float32:
            found[id(held.weight)] = held.weight
    return list(found.values())
