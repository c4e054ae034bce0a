"""What a patched module remembers: the call's runtime and the forward it had."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from hf_fastattn.patches.family import Family
from hf_fastattn.patches.scope import PatchScope
from hf_fastattn.runtime import Runtime
from hf_fastattn.transformers_version import CACHE, supported_versions

STATE = "_fastattn"


@dataclass(frozen=True)
class ModuleState:
    """Attached to each patched module as `_fastattn`.

    Attributes:
        runtime: shared by all modules of the model.
        family: of the model.
        original: the instance's own forward before the patch; None if it used its class's.
    """

    runtime: Runtime
    family: Family
    original: Callable[..., Any] | None

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleState:
        # A copied submodule goes on with the same pages; its own forward must be the copy's.
        return ModuleState(self.runtime, self.family, copy.deepcopy(self.original, memo))


def call_original(module: nn.Module, cache: Any, **kwargs: Any) -> Any:
    """The forward that the module had before the patch, over `cache`."""
    original = vars(module)[STATE].original
    kwargs[CACHE] = cache
    return original(**kwargs) if original is not None else type(module).forward(module, **kwargs)


def replace_forward(
    scope: PatchScope,
    module: nn.Module,
    forwards: Sequence[Callable[..., Any]],
    runtime: Runtime,
    family: Family,
    name: str,
) -> None:
    """Bind that of `forwards` which takes the module's arguments to this instance, where accelerate's hooks keep working.

    Raises:
        ValueError: the module's forward was replaced by someone else, or takes other arguments than any of ours.
    """
    # accelerate's hook is the instance's forward and calls `_old_forward`
    slot = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    current = vars(module).get(slot)
    if STATE in vars(module):
        raise ValueError(
            f"{name} is patched already, but the model is not: it was taken from a patched model or copied without "
            "it; unpatch that model first, or build this one anew"
        )
    if slot == "forward" and current is not None:
        raise ValueError(f"{name}.forward was replaced by {_describe(current)}; undo that before patch()")
    theirs = _parameters(type(module).forward)
    forward = next((ours for ours in forwards if _parameters(ours) == theirs), None)
    if forward is None:
        expected = " or ".join(str(_parameters(ours)) for ours in forwards)
        raise ValueError(
            f"{name} ({type(module).__name__}.forward) takes {theirs}, expected {expected}: transformers "
            f"{transformers.__version__} is not supported; install {supported_versions()}"
        )
    scope.set(module, STATE, ModuleState(runtime, family, current))
    scope.set(module, slot, types.MethodType(forward, module))


def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _describe(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
