"""Whether a patched decoder is still what the patch found, and attends as its family does.

Modules, configuration and the registry of attention functions may change at any time. What is not understood runs
Transformers' own path.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fastattn.patches.modules.module_state import ModuleState
from hf_fastattn.patches.modules.plain_copies import STATE, plain_class, written_class
from hf_fastattn.patches.modules.plain_modules import layers_of
from hf_fastattn.wrappers import calls_forward

# Packages whose functions compute what Transformers' own do: Liger's RoPE is the same in one kernel.
EQUIVALENT = ("transformers.", "liger_kernel.", "hf_fastattn.")
# What an attention module and its decoder look up in their module by name.
LOOKED_UP = ("apply_rotary_pos_emb", "rotate_half", "create_causal_mask", "create_sliding_window_causal_mask")
LOOKED_UP_BY_EAGER = ("eager_attention_forward", "repeat_kv")


def why_not_ours(decoder: Any) -> str | None:
    """Why a decoder, patched once, has to run as Transformers would run it now; None if pages will do."""
    state = vars(decoder).get(STATE)
    if not isinstance(state, ModuleState):
        return f"the {type(decoder).__name__} was put in after patch()"
    return _why_not_forward(decoder, state) or _why_not_layers(decoder, state) or _why_not_attention(decoder)


def _why_not_forward(module: Any, state: ModuleState) -> str | None:
    kind = plain_class(type(module))
    if not calls_forward(kind):
        return f"a {kind.__name__} is called by a function of its own"
    return None if kind.forward is state.class_forward else f"the forward of class {kind.__name__} was replaced"


def _why_not_layers(decoder: Any, state: ModuleState) -> str | None:
    """Whether every layer that has keys and values has them in our attention, at its own place."""
    seen: set[Any] = set()
    config = decoder.config
    for index, layer in enumerate(layers_of(decoder)):
        attention = _attention_of(layer)
        held = None if attention is None else vars(attention).get(STATE)
        if held is None or held.runtime is not state.runtime:
            if attention is None and state.family.linear_attention and hasattr(layer, "linear_attn"):
                continue
            return f"the attention of layer {index} is not the one that was patched"
        if attention.layer_idx != index:
            return f"layer {index} writes to the cache as layer {attention.layer_idx}"
        if getattr(attention, "is_causal", True) is False:
            return f"is_causal=False in layer {index}"
        own = vars(attention).get("config", config)
        if own is not config and own._attn_implementation != config._attn_implementation:
            return f"attn_implementation={own._attn_implementation!r} in layer {index} alone"
        kinds = type(layer), type(attention)
        if kinds not in seen:
            seen.add(kinds)
            reason = _why_not_forward(attention, held) or _why_not_layer(layer)
            if reason is not None:
                return reason
    return None


def _attention_of(layer: Any) -> Any:
    # By attribute only where a wrapper stands around the layer: it costs the host half a microsecond each.
    attention = layer._modules.get("self_attn")
    return getattr(layer, "self_attn", None) if attention is None else attention


def layer_without_our_attention(decoder: Any) -> int | None:
    """The first layer whose attention is not patched together with the decoder; None if all are."""
    state: ModuleState = vars(decoder)[STATE]
    for index, layer in enumerate(layers_of(decoder)):
        attention = _attention_of(layer)
        if attention is None and state.family.linear_attention and hasattr(layer, "linear_attn"):
            continue
        held = None if attention is None else vars(attention).get(STATE)
        if held is None or held.runtime is not state.runtime:
            return index
    return None


def _why_not_layer(layer: Any) -> str | None:
    """A layer of the user's own may read the attention mask, which is not made where pages are read."""
    kind = type(layer)
    known = getattr(kind.forward, "__module__", "").startswith(("transformers.", "torch."))
    return None if known else f"a {kind.__name__} is not Transformers' own layer"


def _why_not_attention(decoder: Any) -> str | None:
    """Whether attention, masks or RoPE were exchanged by name."""
    config = decoder.config
    if getattr(config, "is_causal", True) is False:
        return "is_causal=False in the configuration"
    name = config._attn_implementation
    names: tuple[str, ...] = LOOKED_UP
    if name in (None, "eager"):
        names += LOOKED_UP_BY_EAGER
    elif "/" not in name:
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            function = registry.get(name)
            if function is not None and not _is_equivalent(function):
                return f"attn_implementation={name!r} is a function of {function.__module__}"
    for module in {written_class(type(decoder)).__module__, *_modules_of(decoder)}:
        held = vars(sys.modules[module])
        for looked_up in names:
            if looked_up in held and not _is_equivalent(held[looked_up]):
                return f"{module}.{looked_up} was replaced"
    return None


def _modules_of(decoder: Any) -> set[str]:
    first = next(iter(layers_of(decoder)), None)
    attention = None if first is None else _attention_of(first)
    return set() if attention is None else {written_class(type(attention)).__module__}


def _is_equivalent(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(EQUIVALENT)
