"""Which of PEFT's LoRA layers compute `base(x) + scaling B(A(x))` with plain tensors, so that a kernel may do it.

Everything else is called: DoRA and other variants, biases, dropout in train mode, several adapters at once, hooks, A and B
that are no plain linear layers, and layers of a PEFT whose forward asks for more than is known here. Nothing is remembered:
weights, scaling and the choice of the adapter are read anew each time, and a recorded step's are in its fingerprint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.kernels.layer.lora import MOST_RANK, Adapter
from hf_fastattn.patches.modules.plain_modules import Dtypes, is_plain, linear_parameters
from hf_fastattn.wrappers import runs_class_forward

MODULE = "peft.tuners.lora.layer"
# What the forward of a LoRA layer refers to, in PEFT 0.15 to 0.21.
FORWARD_NAMES = frozenset((
    "_check_forward_args", "pop", "VARIANT_KWARG_KEYS", "disable_adapters", "merged", "unmerge", "base_layer",
    "_mixed_batch_forward", "dtype", "lora_A", "lora_B", "lora_dropout", "lora_variant", "lora_magnitude_vector", "keys",
    "active_adapters", "scaling", "use_dora", "training", "isinstance", "nn", "Identity", "_cast_input_dtype", "weight",
    "get_base_layer", "forward", "to",
))  # fmt: skip

# Weight, bias, adapter.
Adapted = tuple[Tensor, Tensor | None, Adapter | None]


def adapted_parameters(module: nn.Module, device: torch.device, dtypes: Dtypes) -> Adapted | None:
    """What a layer that calling is a linear product, with or without LoRA, multiplies with; None if it is anything else.

    Args:
        device: of its input.
        dtypes: of weights that the product takes: under autocast those that it would cast.
    """
    held = linear_parameters(module, device, dtypes)
    if held is not None:
        return *held, None
    if not _is_lora(module, device):
        return None
    state = vars(module)
    held = linear_parameters(state["_modules"]["base_layer"], device, dtypes)
    if held is None or (state["_disable_adapters"] and state["merged_adapters"]):
        # A merged adapter that is disabled is taken out of the weights by the call.
        return None
    names = [] if state["_disable_adapters"] or state["merged_adapters"] else _active_names(state)
    if not names:
        return *held, None
    adapter = _adapter(state, names[0], held[0]) if len(names) == 1 else None
    return None if adapter is None else (*held, adapter)


def _is_lora(module: nn.Module, device: torch.device) -> bool:
    kind: Any = type(module)
    if kind.__module__ != MODULE or kind.__name__ != "Linear" or not runs_class_forward(module, device):
        return False
    return not module._forward_hooks and not module._forward_pre_hooks and _is_known_forward(kind.forward)


@functools.lru_cache(maxsize=16)
def _is_known_forward(forward: Callable[..., Any]) -> bool:
    own = (forward.__module__, forward.__qualname__) == (MODULE, "Linear.forward")
    code = getattr(forward, "__code__", None)
    return own and code is not None and FORWARD_NAMES.issuperset(code.co_names)


def _active_names(state: dict[str, Any]) -> list[str]:
    """The active adapters that the layer has."""
    active = state["_active_adapter"]
    there = state["_modules"]["lora_A"]._modules
    return [name for name in ([active] if isinstance(active, str) else active) if name in there]


def _adapter(state: dict[str, Any], name: str, weight: Tensor) -> Adapter | None:
    modules, scale = state["_modules"], state["scaling"][name]
    if name in state.get("lora_variant", ()) or state["use_dora"].get(name):
        return None
    # A tensor for a scale would be read by the host; without the cast of x PEFT may fail.
    if type(scale) not in (int, float) or not state.get("cast_input_dtype_enabled", True):
        return None
    if not _passes(modules["lora_dropout"]._modules.get(name), weight.device):
        return None
    a = _low_rank_weight(modules["lora_A"]._modules[name], weight.device)
    b = _low_rank_weight(modules["lora_B"]._modules.get(name), weight.device)
    if a is None or b is None or a.dtype is not b.dtype:
        return None
    rank = a.shape[0]
    if not 0 < rank <= MOST_RANK or a.shape[1] != weight.shape[1] or b.shape != (weight.shape[0], rank):
        return None
    return Adapter(a, b, scale)


def _passes(dropout: Any, device: torch.device) -> bool:
    """Whether calling it returns its argument."""
    if type(dropout) is nn.Identity:
        return is_plain(dropout, "Identity", device)
    passes = type(dropout) is nn.Dropout and (not dropout.training or dropout.p == 0.0)
    return passes and is_plain(dropout, "Dropout", device)


def _low_rank_weight(module: Any, device: torch.device) -> Tensor | None:
    """The weight of a plain linear layer without bias, of any dtype that the kernels take."""
    if type(module) is not nn.Linear:
        return None
    held = linear_parameters(module, device, DTYPES)
    return None if held is None or held[1] is not None else held[0]
