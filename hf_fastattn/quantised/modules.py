"""Linear layers with quantised weights: what kernels read of them, and what a recorded call of them depends on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_fastattn.kernels.quantised.weights import QuantisedWeight, TiledInts, why_not_weight
from hf_fastattn.quantised import bits_and_bytes, torchao
from hf_fastattn.wrappers import runs_class_forward


class QuantisedLinear(NamedTuple):
    """`x W^T + bias` of a layer."""

    weight: QuantisedWeight
    bias: Tensor | None


def quantised_linear(module: nn.Module, device: torch.device, dtype: torch.dtype) -> QuantisedLinear | None:
    """What a layer holds that calling is the product with a quantised weight that kernels read; None if it is anything else.

    Args:
        device: of its input.
        dtype: of its input.
    """
    held = module._parameters
    weight: Any = held.get("weight")
    if weight is None or module._forward_hooks or module._forward_pre_hooks or not runs_class_forward(module, device):
        return None
    found: QuantisedWeight | None
    if type(module) is nn.Linear:
        found = torchao.weight_of(weight, module.in_features)
    else:
        found = bits_and_bytes.block_codes(module) if bits_and_bytes.computes_as(module, dtype) else None
    bias = held.get("bias")
    if found is None or why_not_weight(found, device) is not None:
        return None
    # For x of another dtype tinygemm rounds x, and then y.
    if isinstance(found, TiledInts) and dtype is not torch.bfloat16:
        return None
    if bias is not None and (type(bias) is not nn.Parameter or bias.dtype is not dtype or bias.device != device):
        return None
    return QuantisedLinear(found, bias)


def only_launches(module: nn.Module) -> bool:
    """Whether calling a layer of a library for quantisation does nothing but launch kernels."""
    return bits_and_bytes.block_codes(module) is not None


def is_quantised(weight: Any) -> bool:
    """Whether a weight, which is no plain tensor, is one whose products only launch kernels, if its layer does no more."""
    return bits_and_bytes.is_params(weight) or torchao.is_launching(weight)


def parts_of(weight: Any) -> tuple[Any, ...]:
    """What a recorded forward depends on of a weight that `is_quantised`, as values to compare."""
    return bits_and_bytes.parts_of(weight) if bits_and_bytes.is_params(weight) else torchao.parts_of(weight)
