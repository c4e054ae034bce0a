"""`Fingerprint`: what a recorded forward depends on besides its inputs; and whether a decoder's can be recorded."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_fastattn.autocast import region_dtype
from hf_fastattn.graphs.module_checks import (
    KNOWN,
    PLAIN,
    SCALARS,
    has_foreign_hooks,
    has_global_hooks,
    names_by_row,
    why_not_called,
    why_not_module,
)
from hf_fastattn.graphs.placement import is_there, placed_submodules
from hf_fastattn.graphs.seen_modules import Seen, look
from hf_fastattn.parallel.shards import is_distributed, local_of
from hf_fastattn.parallel.understood import is_understood
from hf_fastattn.quantised.modules import is_quantised, parts_of

UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
# Attributes of modules that are looked at elsewhere, or not frozen.
APART = ("_parameters", "_modules", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
# Attributes that every module has: of those that are scalars only `training` changes what it computes.
COMMON = frozenset(vars(nn.Module()))


class Fingerprint(NamedTuple):
    """What a recorded forward depends on besides its inputs, as values to compare.

    Attributes:
        parts: where weights lie, modules, options, adapters; what the weights hold is not part of it: a replay reads them.
        hooked: the user has hooks on a module; graphs are kept, but not replayed while they are there.
        adapter_names: of each row, where PEFT was asked for several adapters; graphs for other calls are kept.
    """

    parts: tuple[Any, ...]
    hooked: bool
    adapter_names: tuple[str, ...] | None = None


def fingerprint_of(decoder: nn.Module, device: torch.device, seen: Seen | None = None) -> Fingerprint:
    """The fingerprint of a decoder; while it is the same, so is what `why_not_capturable` says.

    Taken before the first kernel of every call, so it has to be quick.

    Args:
        seen: a look at the decoder, or at the model that it is in, since which nothing has changed.
    """
    options = device, region_dtype(device), _options(decoder)
    seen = look(decoder) if seen is None else seen
    return seen.answer(("fingerprint", id(decoder), options), lambda: _fingerprint(decoder, options))


def _fingerprint(decoder: nn.Module, options: tuple[Any, ...]) -> Fingerprint:
    device = options[0]
    parts: list[Any] = [*options, *_tensors(vars(decoder))]
    hooked, names = has_global_hooks(), None
    for module, place in placed_submodules(decoder, device):
        state, kind = vars(module), type(module)
        # The names of instance attributes show a replaced forward, or accelerate's hook.
        names_of_state = tuple(state)
        parts += kind, kind.forward, kind.__call__, names_of_state, state.get("training")
        if "forward" in state or state.get("_compiled_call_impl") is not None:
            parts += why_not_called(module, place), place
        for name in _own(names_of_state):
            value = state[name]
            if type(value) in SCALARS or (value is not None and isinstance(value, Number)):
                parts.append(value)
        if state["_parameters"] or state["_buffers"]:
            parts += _tensors(state)
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            hooked = hooked or has_foreign_hooks(state)
            names = names_by_row(module) if names is None else names
        if not kind.__module__.startswith(KNOWN[:2]):
            parts.append(_frozen({name: value for name, value in state.items() if name not in APART}))
    return Fingerprint(tuple(parts), hooked, None if names is None else tuple(names))


def why_not_capturable(
    decoder: Any, device: torch.device, why_not_experts: Callable[..., str | None] | None = None, rotates: bool = True
) -> str | None:
    """Why the decoder's launches may differ from step to step, or cannot be recorded; None if they can be.

    Args:
        why_not_experts: says it of a decoder with a mixture of experts; without it none can be recorded.
        rotates: its rotary embedding is asked.
    """
    if device.type == "cuda" and os.environ.get(UNCACHED):
        # Nothing can be allocated during a capture then, and PyTorch ends the process when one fails.
        return f"{UNCACHED} is set"
    if has_experts(decoder):
        reason = why_not_experts(decoder) if why_not_experts else "a mixture of experts chooses what it computes"
        if reason is not None:
            return reason
    if has_global_hooks():
        return "hooks on all modules are registered"
    held = [(tensor, device) for tensor in _held(vars(decoder))]
    for module, place in placed_submodules(decoder, device):
        reason = why_not_module(module, place) if rotates or "rope_type" not in vars(module) else None
        if reason is not None:
            return reason
        state = vars(module)
        if state["_parameters"] or state["_buffers"]:
            parts = list(_held(state))
            # Of a layer that is spread over ranks a graph reads this rank's part.
            known = any(map(is_distributed, parts)) and is_understood(module)
            held += [(local_of(tensor) if known else tensor, place) for tensor in parts]
    for tensor, place in held:
        if type(tensor) not in PLAIN and not is_quantised(tensor):
            return f"a parameter is a {type(tensor).__name__}"
        if not is_there(tensor.device, place):
            return f"the model is on {tensor.device} and {place}"
    return None


def has_experts(decoder: Any) -> bool:
    """Whether the configuration speaks of experts."""
    config = decoder.config.get_text_config(decoder=True)
    return bool(getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0))


@functools.lru_cache(maxsize=1024)
def _own(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those attributes that not every module has."""
    return tuple(name for name in names if name not in COMMON)


def _options(decoder: Any) -> tuple[Any, ...]:
    matmul = torch.backends.cuda.matmul
    return (
        type(decoder),
        decoder.training,
        getattr(decoder, "gradient_checkpointing", False),
        str(getattr(decoder.config.get_text_config(decoder=True), "rope_parameters", None)),
        # generate() switches between these two, which compute the same.
        str(getattr(decoder.config, "_experts_implementation", None)).replace("grouped_mm", "batched_mm"),
        # PyTorch's older question raises an error once somebody has answered the newer one.
        matmul.fp32_precision if hasattr(matmul, "fp32_precision") else torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def _held(state: dict[str, Any]) -> Iterator[Tensor]:
    """Parameters and buffers of a module, by its `vars`."""
    for held in (state["_parameters"], state["_buffers"]):
        for tensor in held.values():
            if tensor is not None:
                yield tensor


def _tensors(state: dict[str, Any]) -> list[Any]:
    # `why_not_capturable` refuses all other subclasses; some of them have no `data_ptr()`.
    return [
        (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        if type(tensor) in PLAIN
        else parts_of(tensor)
        for held in (state["_parameters"], state["_buffers"])
        for tensor in map(local_of, held.values())
        if type(tensor) in PLAIN or is_quantised(tensor)
    ]


def _frozen(value: Any) -> Any:
    """`value` in a form that can be compared: plain values and containers of them, anything else by identity."""
    if value is None or type(value) in SCALARS:
        return value
    if isinstance(value, dict):
        return tuple((name, _frozen(entry)) for name, entry in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(_frozen(entry) for entry in value)
    return id(value)
