"""How a decoder or an attention module is patched: a class of the same name with our forward, and what it remembers.

A class, not a function on the instance: a bound method in a module's dictionary would refer to the module, and `del model`
would free nothing until the garbage collector runs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, cast

import transformers
from torch import nn

from hf_fastattn.graphs.module_checks import is_our_forward
from hf_fastattn.kernels.variants.prepared import PreparedVariant
from hf_fastattn.patches.family import Family
from hf_fastattn.patches.modules.plain_copies import STATE, PlainCopies, plain_class
from hf_fastattn.patches.modules.scope import PatchScope
from hf_fastattn.runtime import Runtime
from hf_fastattn.transformers_version import CACHE, NEW_NAME, OLD_NAME, spelled_as_here, supported_versions
from hf_fastattn.wrappers import compiled_from, is_class_forward

# Where a module keeps a forward of its own: `_old_forward` is what accelerate's hook calls, and puts into `forward` again
# when it is removed.
SLOTS = ("forward", "_old_forward")


@dataclass(frozen=True)
class ModuleState:
    """Attached to each patched module as `_fastattn`.

    Attributes:
        runtime: shared by all modules of the model.
        family: of the model.
        original: what accelerate's hook on the module called before the patch, or a forward that was compiled then; None if
            the module had none of its own.
        class_forward: the forward of the module's class then.
        variant: of attention, if the layer has one.
    """

    runtime: Runtime
    family: Family
    original: Callable[..., Any] | None
    class_forward: Callable[..., Any]
    variant: PreparedVariant | None = None

    def plain_slots(self, module: Any) -> dict[str, Any]:
        """What the slots that hold our forward would hold without the patch; None where there would be nothing."""
        ours = [slot for slot in SLOTS if is_our_forward(vars(module).get(slot))]
        theirs = types.MethodType(plain_class(type(module)).forward, module)
        return {slot: self.original or (theirs if slot == "_old_forward" else None) for slot in ours}


def patched_forward(forward: Callable[..., Any], over: type | None = None) -> Callable[..., Any]:
    """`forward`, spelled as this Transformers does, and known as ours wherever it is found.

    Args:
        over: the class of caches that it serves; with another one, or none, it does no more than call the original.
    """
    ours = spelled_as_here(forward)
    if CACHE != NEW_NAME:
        ours = _without_foreign_caches(ours)
    if over is not None:
        ours = _only_over(over, ours)
    ours.patched_forward = ours  # type: ignore[attr-defined]
    return ours


def _without_foreign_caches(ours: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' continuous batching gives attention its own cache by the new name; the parameter has the old one."""

    @functools.wraps(ours)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if NEW_NAME in kwargs:
            return original_forward(self)(*args, **kwargs)
        return ours(self, *args, **kwargs)

    return forward


def _only_over(kind: type, ours: Callable[..., Any]) -> Callable[..., Any]:
    """The original at once where no cache of this kind is given: with another cache a layer does no more than it did."""

    @functools.wraps(ours)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Hidden states are the only argument that Transformers gives by position; a second one may be the cache.
        if len(args) < 2 and not (isinstance(kwargs.get(CACHE), kind) or isinstance(kwargs.get(OLD_NAME), kind)):
            state = vars(self).get(STATE)
            if state is None or state.variant is None:
                # As `original_forward`, which binds the module; this is called for every layer.
                if state is None or state.original is None:
                    return plain_class(type(self)).forward(self, *args, **kwargs)
                return state.original(*args, **kwargs)
        return ours(self, *args, **kwargs)

    return forward


def call_original(module: Any, cache: Any, **kwargs: Any) -> Any:
    """The forward that the module had before the patch, over `cache`."""
    kwargs[CACHE] = cache
    return original_forward(module)(**kwargs)


def original_forward(module: Any) -> Callable[..., Any]:
    """The forward that the module had before the patch."""
    state = vars(module).get(STATE)
    if state is not None and state.original is not None:
        return cast(Callable[..., Any], state.original)
    return functools.partial(plain_class(type(module)).forward, module)


def replace_forward(
    scope: PatchScope,
    module: nn.Module,
    forwards: Sequence[Callable[..., Any]],
    runtime: Runtime,
    family: Family,
    name: str,
    variant: PreparedVariant | None = None,
) -> None:
    """Give the module that of `forwards` which takes its arguments, where accelerate's hooks keep working.

    A forward that was compiled makes way; ours is not compiled.

    Raises:
        ValueError: the module's forward was replaced by someone else, or takes other arguments than any of ours.
    """
    state = vars(module)
    kind: Any = type(module)
    if STATE in state:
        raise ValueError(
            f"{name} is patched already, but the model is not: it was taken from a patched model; unpatch that model "
            "first, or build this one anew"
        )
    slot = "_old_forward" if "_hf_hook" in state else "forward"
    original = state.get(slot)
    if original is not None and not is_class_forward(module, compiled_from(original) or original):
        raise ValueError(f"{name}.forward was replaced by {_describe(original)}; undo that before patch()")
    if not kind.forward.__module__.startswith("transformers."):
        raise ValueError(f"{kind.__name__}.forward was replaced by {_describe(kind.forward)}; undo that before patch()")
    theirs = _parameters(kind.forward)
    forward = next((ours for ours in forwards if _parameters(ours) == theirs), None)
    if forward is None:
        expected = " or ".join(str(_parameters(ours)) for ours in forwards)
        raise ValueError(
            f"{name} ({kind.__name__}.forward) takes {theirs}, expected {expected}: transformers "
            f"{transformers.__version__} is not supported; install {supported_versions()}"
        )
    scope.set(module, STATE, ModuleState(runtime, family, original, kind.forward, variant))
    scope.set(module, "__class__", patched_class(kind, forward))
    if original is not None:
        scope.set(module, slot, types.MethodType(type(module).forward, module))


def release_slots(module: Any) -> None:
    """Take our forward out of the slots of a patched module that hooks put on since have copied it into."""
    for slot, value in vars(module)[STATE].plain_slots(module).items():
        if value is None:
            delattr(module, slot)
        else:
            setattr(module, slot, value)


@functools.cache
def patched_class(base: Any, forward: Callable[..., Any]) -> Any:
    """A subclass of a module's class, by the same name, with `forward`: Transformers looks classes up by it."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (PlainCopies, base), {**names, "forward": forward, "_fastattn_base": base})


def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(signature(forward).parameters)[1:]


def _describe(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
