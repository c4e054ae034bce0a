"""Which modules and hooks are known to launch kernels and do nothing else."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from hf_fastattn.parallel.gathered_weights import is_sharded_kind
from hf_fastattn.parallel.understood import is_understood
from hf_fastattn.quantised.modules import only_launches
from hf_fastattn.wrappers import COMPILER, is_compiled, runs_class_forward

# Modules of other packages may count calls, synchronise with the device or change themselves; a replay would skip that.
KNOWN = ("torch.nn.", "transformers.", "peft.")

# PEFT's adapters whose forward copies from the host, and so waits, at every step; all of their module.
COPIES_FROM_HOST = ("peft.tuners.trainable_tokens.layer", "peft.tuners.fourierft.layer")

CAPTURE_HOOK = "output_capturing_hook"
# Hooks that change no value: they record outputs if they are asked for, or mark the embeddings for gradients.
HARMLESS_HOOKS = (CAPTURE_HOOK, "make_inputs_require_grads", "make_inputs_require_grad")
# Kinds of values, and of tensors, of which a look says everything.
SCALARS = frozenset((bool, int, float, str))
PLAIN = (nn.Parameter, torch.Tensor)
# The hook by which PEFT tells its layers the adapter of each row, for the length of a call.
NAMES_HOOK = ("peft.tuners.lora.model", "_adapter_names_pre_forward_hook")
# Attributes of modules one of which torch.compile, or whoever compiled a forward before the patch, has left.
COMPILED_SIGNS = frozenset(("_compiled_call_impl", "forward", "_old_forward", "_fastattn"))


def submodules(decoder: nn.Module) -> Iterator[nn.Module]:
    """All modules below the decoder; one that is there twice comes twice."""
    stack = [decoder]
    while stack:
        for module in stack.pop()._modules.values():
            if module is not None:
                stack.append(module)
                yield module


def is_our_forward(function: Any) -> bool:
    """Whether it is the forward of a patched class, or one bound to a module; see `patches.modules.module_state`."""
    function = getattr(function, "__func__", function)
    # Not its name: `functools.wraps` gives that, and attributes, to a user's wrapper.
    return function is not None and getattr(function, "patched_forward", None) is function


def why_not_module(module: nn.Module, device: torch.device) -> str | None:
    """Why calling this module, apart from those in it, may do more than launch kernels; None if it doesn't.

    Args:
        device: on which everything is that the module is given.
    """
    return why_not_called(module, device) or why_not_kind(module)


def why_not_called(module: nn.Module, device: torch.device) -> str | None:
    """Why a call of the module may run more than the forward of its class."""
    # Of a module that is spread over ranks this is known at once.
    if is_understood(module) or runs_class_forward(module, device) or is_compiled_module(module):
        return None
    state, kind = vars(module), type(module)
    if "_hf_hook" in state:
        hook = type(state["_hf_hook"]).__name__
        return f"a {hook} on a {kind.__name__} may change or move tensors: one device needs no hooks"
    if "forward" not in state:
        return f"a {kind.__name__} is called by a function of its own"
    return f"the forward of a {kind.__name__} was replaced"


def is_compiled_module(module: Any) -> bool:
    """Whether torch.compile made this module around another one, which it calls."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == (COMPILER, "OptimizedModule")


def has_compiled(model: nn.Module) -> bool:
    """Whether torch.compile made anything that a call of the model runs."""
    if "torch._dynamo" not in sys.modules:
        return False
    # Asked before the prompt of every call: most modules have none of the signs.
    for module in (model, *submodules(model)):
        signs = not vars(module).keys().isdisjoint(COMPILED_SIGNS) or type(module).__module__ == COMPILER
        if signs and is_compiled_itself(module):
            return True
    return False


def is_compiled_itself(module: nn.Module) -> bool:
    """Whether torch.compile made the module's forward, or what calls it; apart from the modules in it."""
    state = vars(module)
    if state.get("_compiled_call_impl") is not None or is_compiled_module(module):
        return True
    # What was compiled before the patch is called where ours is not.
    held = state.get("_fastattn")
    original = None if held is None else getattr(held, "original", None)
    # Of a model with accelerate's hooks every module is asked, before each call.
    for function in (state.get("forward"), state.get("_old_forward"), original):
        if function is not None and is_compiled(function):
            return True
    return False


def why_not_kind(module: nn.Module) -> str | None:
    """Why a module of this class and with these hooks may do more than launch kernels, whatever its forward is."""
    state = vars(module)
    kind: Any = type(module)
    if is_sharded_kind(kind):
        return f"forwards gather the weights from other processes: a {kind.__name__} is sharded by FSDP"
    if not kind.__module__.startswith(KNOWN) and not is_compiled_module(module) and not only_launches(module):
        return f"a {kind.__module__}.{kind.__name__} may do more than launch kernels"
    if has_foreign_hooks(state):
        return f"a {kind.__name__} has hooks"
    if kind.__module__ in COPIES_FROM_HOST and not (state.get("_disable_adapters") or state.get("merged_adapters")):
        return f"a {kind.__name__} copies from the host at every step: merge_adapter() ends that"
    types = state.get("rope_type")
    if types is None:
        return None
    for rope_type in types.values() if isinstance(types, dict) else (types,):
        if "dynamic" in rope_type or "longrope" in rope_type:
            return f"the frequencies of {rope_type!r} RoPE depend on the length"
    return None


def draws(module: nn.Module) -> bool:
    """Whether the module is an active dropout. A graph may hold one: each replay goes on with CUDA's own generator."""
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def has_global_hooks() -> bool:
    return bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


def has_foreign_hooks(state: dict[str, Any]) -> bool:
    if not state["_forward_hooks"] and not state["_forward_pre_hooks"]:
        # Asked of every module before a prompt, and most have none.
        return False
    # Transformers leaves its own hooks on a model that was ever asked for hidden states, or enabled for checkpointing.
    hooks = [*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values()]
    return any(getattr(hook, "__name__", "") not in HARMLESS_HOOKS and named_rows(hook) is None for hook in hooks)


def named_rows(hook: Any) -> Sequence[str] | None:
    """The adapter of each row, of PEFT's hook for them; None of any other hook."""
    if type(hook) is not functools.partial or (hook.func.__module__, hook.func.__name__) != NAMES_HOOK:
        return None
    names: Sequence[str] | None = hook.keywords.get("adapter_names")
    return names


def names_by_row(module: nn.Module) -> Sequence[str] | None:
    """The adapter of each row that PEFT's hook, the only one before the module's forward, asks for; None without it."""
    hooks = module._forward_pre_hooks
    return named_rows(next(iter(hooks.values()))) if len(hooks) == 1 else None
