"""Which of PEFT's LoRA layers compute `base(x) + scaling B(A(x))` with plain tensors, so that a kernel may do it.

The sum may be over several adapters, or each row may have its own (`adapter_names=`, which PEFT gives to the layers by
hooks). Everything else is called: DoRA and other variants, biases, dropout in train mode, other hooks, A and B that are no
plain linear layers, and layers of a PEFT whose forward asks for more than is known here. Nothing is remembered: weights,
scaling and the choice of adapters are read anew each time, and a recorded step's are in its fingerprint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_fastattn.graphs.module_checks import names_by_row
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

# What it does for rows with their own adapters, which is in a method of its own.
MIXED_NAMES = FORWARD_NAMES | {"append", "enumerate", "set", "get"}

# Number and adapter: tokens of that number have it.
NumberedAdapter = tuple[int, Adapter]


class Adapted(NamedTuple):
    """What a linear layer with LoRA multiplies with.

    Attributes:
        members: the adapters to add, all of number 0, or each of the number of its name.
    """

    weight: Tensor
    bias: Tensor | None
    members: list[NumberedAdapter]


def adapted_parameters(
    module: nn.Module, device: torch.device, dtypes: Dtypes, names: tuple[str, ...] | None = None
) -> Adapted | None:
    """What a layer that calling is a linear product, with or without LoRA, multiplies with; None if it is anything else.

    Args:
        device: of its input.
        dtypes: of weights that the product takes: under autocast those that it would cast.
        names: adapters that rows choose from, in a call that PEFT's hooks give each row its own.
    """
    held = linear_parameters(module, device, dtypes)
    if held is not None:
        return Adapted(*held, [])
    if not _is_lora(module, names is not None, device):
        return None
    state = vars(module)
    held = linear_parameters(state["_modules"]["base_layer"], device, dtypes)
    disabled, merged = state["_disable_adapters"], bool(state["merged_adapters"])
    if held is None or (merged and (disabled or names is not None)):
        # A merged adapter that is disabled is taken out of the weights by the call; with one, rows cannot have their own.
        return None
    members = []
    for number, name in [] if disabled or merged else _chosen(state, names):
        adapter = _adapter(state, name, held[0])
        if adapter is None:
            return None
        members.append((number, adapter))
    return Adapted(*held, members)


def _is_lora(module: nn.Module, by_row: bool, device: torch.device) -> bool:
    kind: Any = type(module)
    if kind.__module__ != MODULE or kind.__name__ != "Linear" or not runs_class_forward(module, device):
        return False
    if by_row and (names_by_row(module) is None or not _is_known(kind._mixed_batch_forward, "LoraLayer", MIXED_NAMES)):
        return False
    hooks = module._forward_hooks or (module._forward_pre_hooks and not by_row)
    return not hooks and _is_known(kind.forward, "Linear", FORWARD_NAMES)


@functools.lru_cache(maxsize=16)
def _is_known(method: Callable[..., Any], kind: str, names: frozenset[str]) -> bool:
    """Whether a method is PEFT's, of that class, and refers to these names alone."""
    code = getattr(method, "__code__", None)
    own = method.__module__ == MODULE and method.__qualname__ == f"{kind}.{method.__name__}"
    return own and code is not None and names.issuperset(code.co_names)


def _chosen(state: dict[str, Any], names: tuple[str, ...] | None) -> list[tuple[int, str]]:
    """The adapters of the layer that it is to add, by number."""
    there = state["_modules"]["lora_A"]._modules
    if names is not None:
        return [(number, name) for number, name in enumerate(names) if name in there]
    active = state["_active_adapter"]
    return [(0, name) for name in ([active] if isinstance(active, str) else active) if name in there]


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
