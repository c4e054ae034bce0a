"""`look`: whether the modules of a model are as they were when somebody looked before, which is quicker to tell than what
they are.

What is asked of all modules before every call (what graphs depend on, who watches hidden states, which state keys belong
to) is answered anew only after a change. What one look cannot vouch for is asked every time: hooks, tensors that are no
parameters, other things that may change inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from numbers import Number
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from hf_fastattn.graphs.module_checks import PLAIN, SCALARS, has_global_hooks
from hf_fastattn.graphs.module_columns import ModuleColumns, ModuleRecord

# Attributes that every module has; of these `ModuleColumns` looks at those that say what a module computes.
COMMON = frozenset(vars(nn.Module()))
# Attributes that change nothing, or are looked at by whoever needs them.
SWITCHED = frozenset(("_experts_implementation_internal",))
VALUES = (torch.dtype, torch.device, torch.Size, torch.layout)
# Of a parameter that ZeRO-3 has partitioned or gathered.
ZERO_STATUS = "ds_status"
# Looks that are remembered of a model: trainers switch between modes.
MOST = 4

Answer = TypeVar("Answer")


class _UnsureError(Exception):
    """Something may change without being seen to."""


# The others of modules that are not made as others are, or have gone.
UNSURE = (_UnsureError, KeyError, AttributeError)


class Same:
    """Stands for one object, and is equal to what stands for the same one alone: an address may be another's later."""

    def __init__(self, value: Any) -> None:
        try:
            self._held: Any = weakref.ref(value)
        except TypeError:
            self._held = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (value := self._held()) is not None and value is other._held()

    __hash__ = None  # type: ignore[assignment]


class Seen:
    """The modules from a root down as they were found, with what was asked of them then."""

    def __init__(self, root: nn.Module) -> None:
        self._columns = ModuleColumns(())
        self._configs: list[tuple[weakref.ref[Any], Any]] = []
        self._answers: dict[Hashable, Any] = {}
        # The module that this look cannot vouch for.
        self._unsure: weakref.ref[nn.Module] | None = None
        self.is_sure = False
        try:
            if not has_global_hooks():
                self._note(root)
                self.is_sure = True
        except UNSURE:
            self._configs = []

    @property
    def is_unsure_still(self) -> bool:
        """Whether what a look cannot vouch for is there yet: to come upon it again may take long."""
        module = None if self._unsure is None else self._unsure()
        try:
            return module is not None and not _record(module, {})
        except UNSURE:
            return True

    def answer(self, question: Hashable, ask: Callable[[], Answer]) -> Answer:
        """What `ask` says of these modules, which nothing else may decide; it is asked once if a change would be seen."""
        if not self.is_sure:
            return ask()
        if question not in self._answers:
            self._answers[question] = ask()
        return cast(Answer, self._answers[question])

    def _note(self, root: nn.Module) -> None:
        configs: dict[int, Any] = {}
        noted: list[tuple[nn.Module, ModuleRecord]] = []
        stack = [root]
        while stack:
            module = stack.pop()
            try:
                noted.append((module, _record(module, configs)))
            except UNSURE:
                self._unsure = weakref.ref(module)
                raise
            stack += [child for child in module._modules.values() if child is not None]
        self._columns = ModuleColumns(noted)
        self._configs = [(weakref.ref(config), _contents(vars(config))) for config in configs.values()]

    def holds(self, root: nn.Module) -> bool:
        """Whether a look at the modules now would find the same."""
        if not self.is_sure or has_global_hooks():
            return False
        try:
            if not self._columns.hold(root, _contents):
                return False
            return all(_contents(vars(ref())) == contents for ref, contents in self._configs)
        except UNSURE:
            return False


# By root, the newest first.
_looks: weakref.WeakKeyDictionary[nn.Module, list[Seen]] = weakref.WeakKeyDictionary()


def look(root: nn.Module) -> Seen:
    """The modules from `root` down: the same object as before if nothing has changed since."""
    known = _looks.get(root, [])
    if known and known[0].is_unsure_still:
        return known[0]
    found = next((seen for seen in known if seen.holds(root)), None)
    if found is None:
        found = Seen(root)
    if not known or known[0] is not found:
        _looks[root] = [found, *(seen for seen in known if seen is not found and seen.is_sure)][:MOST]
    return found


def _record(module: nn.Module, configs: dict[int, Any]) -> ModuleRecord:
    state = vars(module)
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or "_hf_hook" in state:
        raise _UnsureError
    scalars: dict[str, Any] = {}
    objects: list[tuple[str, weakref.ref[Any]]] = []
    contents: list[tuple[str, Any]] = []
    for name, value in state.items():
        if name in COMMON:
            continue
        if value is None or type(value) in SCALARS or isinstance(value, (*VALUES, Number, str)):
            scalars[name] = value
        elif isinstance(value, dict | list | tuple | set | frozenset):
            contents.append((name, _contents(value)))
        elif isinstance(value, torch.Tensor):
            raise _UnsureError
        else:
            if isinstance(value, PretrainedConfig):
                configs[id(value)] = value
            objects.append((name, _reference(value)))
    _check_tensors(state)
    return ModuleRecord(scalars, objects, contents)


def _reference(value: Any) -> weakref.ref[Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        raise _UnsureError from None


def _check_tensors(state: dict[str, Any]) -> None:
    for tensor in (*state["_parameters"].values(), *state["_buffers"].values()):
        # Of tensors without an address, nothing would tell two devices apart.
        if tensor is not None and (type(tensor) not in PLAIN or ZERO_STATUS in tensor.__dict__ or not tensor.data_ptr()):
            raise _UnsureError


def _contents(value: Any) -> Any:
    """Values in a form that can be compared: numbers, texts, containers of these, all else by identity.

    Raises:
        _UnsureError: something in it may change without being seen to.
    """
    if value is None or type(value) in SCALARS or isinstance(value, VALUES):
        return value
    if isinstance(value, dict):
        return [(name, _contents(entry)) for name, entry in value.items() if name not in SWITCHED]
    if isinstance(value, list | tuple | set | frozenset):
        return [_contents(entry) for entry in value]
    if isinstance(value, Number | str):
        return type(value), repr(value)
    if isinstance(value, PretrainedConfig):
        return _contents(vars(value))
    if isinstance(value, torch.Tensor | nn.Module):
        raise _UnsureError
    return Same(value)
