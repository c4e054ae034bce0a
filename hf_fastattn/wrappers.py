"""What stands around a module's forward and changes no result: accelerate's hooks that move nothing, torch.compile, TRL,
Transformers' tensor parallelism on modules that are the same on every rank.

accelerate puts a partial function in the place of `forward`; it calls the hook, `_old_forward`, and the hook again. A hook
that sends tensors to the device where they are, as `dispatch_model` leaves on every module, does nothing. A compiled
function computes what the one does that it was made from. By other signs than its own code no function is known: whoever
wraps one with `functools.wraps` gives the wrapper its name, its module and its attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

HOOKS = "accelerate.hooks"
COMPILER = "torch._dynamo.eval_frame"
FRAMES = "torch._dynamo.external_utils"
TRL_UTILS = "trl.trainer.utils"
RANKS = "transformers.distributed.tensor_parallel"
# What PyTorch runs when a module is called.
CALL = nn.Module._wrapped_call_impl
# By which a model prepares the inputs of a forward, and those of the next from its outputs.
PREPARING = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


def runs_class_forward(module: Any, device: torch.device) -> bool:
    """Whether calling the module, PyTorch's own hooks aside, runs the forward of its class and nothing that changes it.

    Args:
        device: on which everything is that the module is given.
    """
    forward = vars(module).get("forward")
    own = forward is None or _is_hooked_once(module, forward, device)
    return (own or is_class_forward(module, below_wrappers(module, forward, device))) and is_called_as_ever(module)


def is_called_as_ever(module: Any) -> bool:
    """Whether calling the module comes to its forward, by way of `Module.compile()` or not."""
    if type(module).__call__ is not CALL and not calls_forward(type(module)):
        return False
    call = vars(module).get("_compiled_call_impl")
    return call is None or _is_own(module, compiled_from(call), "_call_impl")


def calls_forward(kind: Any) -> bool:
    """Whether what runs when a module of the class is called is PyTorch's, or a library's around PyTorch's."""
    # Asked of hundreds of modules a forward.
    call = kind.__call__
    if call is CALL:
        return True
    # A patched class has one of its own, which calls that of the class before.
    base = vars(kind).get("_fastattn_base")
    return calls_forward(base) if base is not None else _is_librarys(call)


def below_wrappers(module: Any, forward: Any, device: torch.device) -> Any:
    """A forward of the module without what changes nothing around it."""
    while not is_class_forward(module, forward):
        below = (
            compiled_from(forward) or _below_hook(module, forward, device) or below_trl(forward) or below_replicated(forward)
        )
        if below is None:
            break
        forward = below
    return forward


def is_class_forward(module: Any, forward: Any) -> bool:
    """Whether it is the forward of the module's class, with or without that one's decorators."""
    return _is_own(module, forward, "forward")


def below_trl(forward: Any) -> Any:
    """What the forward with a head for losses, which TRL's trainers put on a model, calls in generation; else None.

    It computes losses without logits if `fused_lm_head=True` is given, and calls the forward that was there if not.
    """
    function = _function(forward)
    code = getattr(function, "__code__", None)
    if code is None or origin_of(function) != TRL_UTILS or code.co_name != "_fused_forward":
        return None
    held = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    return held["original_forward"].cell_contents if "original_forward" in held else None


def below_replicated(forward: Any) -> Any:
    """What Transformers' forward of a module that is the same on every rank calls; None if it is no such forward.

    With gradients it sums those of the parameters over the ranks; it changes no output.
    """
    code = getattr(forward, "__code__", None)
    if code is None or code.co_name != "tp_forward" or origin_of(forward) != RANKS:
        return None
    held = dict(zip(code.co_freevars, forward.__closure__ or (), strict=True))
    return held["original_forward"].cell_contents if "is_already_hooked" in held else None


def compiled_from(function: Any) -> Any:
    """What torch.compile, or torch.compiler.disable, made this function from; None if neither did."""
    if not is_compiled(function):
        return None
    original = vars(_function(function))["_torchdynamo_orig_callable"]
    # Around a function of PyTorch's own it puts another frame.
    return original.__wrapped__ if origin_of(original) == FRAMES and hasattr(original, "__wrapped__") else original


def is_compiled(function: Any) -> bool:
    """Whether torch.compile, or torch.compiler.disable, made this function."""
    if type(function) is functools.partial:
        return False
    function = _function(function)
    own = getattr(function, "__globals__", {}).get("__name__") == COMPILER
    return own and "_torchdynamo_orig_callable" in vars(function)


def moves_nothing(hook: Any, device: torch.device) -> bool:
    """Whether a hook of accelerate leaves what is on the device as it is.

    `skip_keys` and ties between weights say what a hook that moves would move; offloading takes the weights away after
    every forward.
    """
    kind: Any = type(hook)
    if not _is_accelerates(kind, getattr(kind, "pre_forward", None), getattr(kind, "post_forward", None)) or hook.no_grad:
        return False
    own = vars(hook)
    if "pre_forward" in own or "post_forward" in own:
        return False
    if kind.__name__ == "SequentialHook":
        return all(moves_nothing(inner, device) for inner in hook.hooks)
    if kind.__name__ == "AlignDevicesHook":
        return not hook.offload and _is_device(hook.execution_device, device)
    return kind.__name__ == "ModelHook"


def align_hooks(module: Any) -> Sequence[Any]:
    """The hooks of accelerate on a module, in their order, that send what it is given to a device."""
    hook = vars(module).get("_hf_hook")
    if type(hook).__name__ == "AlignDevicesHook":
        return (hook,)
    return [held for held in getattr(hook, "hooks", ()) if type(held).__name__ == "AlignDevicesHook"]


@functools.lru_cache(maxsize=64)
def device_named(name: Any) -> torch.device | None:
    """The device by a name or number; None for a number without an accelerator, or a name such as "disk"."""
    try:
        return torch.device(name)
    except RuntimeError:
        return None


def origin_of(forward: Any) -> str:
    """The module in which the code of a forward stands, whatever the function says of itself."""
    function = _function(forward)
    function = function.func if isinstance(function, functools.partial) else function
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))


def prepared_by(model: Any) -> str:
    """The module in which the code stands that prepares the inputs of a model's forwards, or goes on from their outputs."""
    # The second one of the class is ours.
    own = [vars(model)[name] for name in PREPARING if name in vars(model)]
    origins = [origin_of(method) for method in (*own, type(model).prepare_inputs_for_generation)]
    return next((origin for origin in origins if not origin.startswith("transformers.")), origins[-1])


def _below_hook(module: Any, forward: Any, device: torch.device) -> Any:
    """What accelerate's hook calls, if `forward` is its function and the hook moves nothing; else None."""
    state = vars(module)
    hook = state.get("_hf_hook")
    if hook is None or type(forward) is not functools.partial or forward.args[:1] != (module,):
        return None
    return state.get("_old_forward") if origin_of(forward) == HOOKS and moves_nothing(hook, device) else None


def _is_hooked_once(module: Any, forward: Any, device: torch.device) -> bool:
    """Whether the forward is that of the class, below a hook that moves nothing: asked of hundreds of modules a call."""
    state = vars(module)
    held = state.get("_old_forward")
    if type(forward) is not functools.partial or getattr(held, "__func__", None) is not type(module).forward:
        return False
    arguments, names = forward.args, getattr(forward.func, "__globals__", {})
    own = held.__self__ is module and len(arguments) == 1 and arguments[0] is module and names.get("__name__") == HOOKS
    return own and moves_nothing(state.get("_hf_hook"), device)


@functools.lru_cache(maxsize=64)
def _is_librarys(call: Any) -> bool:
    # PEFT's holders of tensors have one that raises, as PyTorch's do.
    return origin_of(call).startswith(("torch.", "transformers.", "peft."))


@functools.lru_cache(maxsize=64)
def _is_accelerates(kind: Any, before: Any, after: Any) -> bool:
    return all(getattr(known, "__module__", "") == HOOKS for known in (kind, before, after))


def _is_device(wanted: Any, device: torch.device) -> bool:
    """Whether what is sent to `wanted` stays on the device."""
    if wanted is None:
        return True
    place = device_named(wanted)
    if place is None or place == device:
        return place is not None
    if place.index is None and device.type == "cuda" == place.type:
        return device.index == torch.cuda.current_device()
    # A processor is one device, by whatever number.
    return device.type == "cpu" == place.type


def _function(forward: Any) -> Any:
    return getattr(forward, "__func__", forward)


def _is_own(module: Any, method: Any, name: str) -> bool:
    if getattr(method, "__self__", module) is not module:
        return False
    function, own = _function(method), getattr(type(module), name)
    while own is not function and hasattr(own, "__wrapped__"):
        own = own.__wrapped__
    return function is not None and own is function
