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
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from hf_fastattn.graphs.module_checks import PLAIN, SCALARS, has_global_hooks

# Attributes that every module has; of these `_Record` looks at those that say what a module computes.
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


# The second one of modules that are not made as others are.
UNSURE = (_UnsureError, KeyError)


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


class _Record(NamedTuple):
    """One module.

    Attributes:
        held: of its attributes.
        training: its mode.
        scalars: the names of its own attributes that are numbers and the like, and `values` of these.
        objects: other attributes of its own.
        contents: attributes of its own that hold values.
        tensors: of its parameters and buffers the kind, and where and how they lie.
        children: the names of the modules in it.
    """

    kind: type
    forward: Any
    held: int
    training: Any
    scalars: list[str]
    values: list[Any]
    objects: list[tuple[str, weakref.ref[Any]]]
    contents: list[tuple[str, Any]]
    tensors: list[tuple[Any, ...]]
    children: list[str]


class Seen:
    """The modules from a root down as they were found, with what was asked of them then."""

    def __init__(self, root: nn.Module) -> None:
        self._records: list[_Record] = []
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
            self._records, self._configs = [], []

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
        stack = [root]
        while stack:
            module = stack.pop()
            try:
                self._records.append(_record(module, configs))
            except UNSURE:
                self._unsure = weakref.ref(module)
                raise
            stack += [child for child in module._modules.values() if child is not None]
        self._configs = [(weakref.ref(config), _contents(vars(config))) for config in configs.values()]

    def holds(self, root: nn.Module) -> bool:
        """Whether a look at the modules now would find the same."""
        if not self.is_sure or has_global_hooks():
            return False
        stack = [root]
        try:
            for record in self._records:
                if not stack:
                    return False
                module = stack.pop()
                state = module.__dict__
                if type(module) is not record.kind or len(state) != record.held or not _is_as_noted(state, record):
                    return False
                held = state["_modules"]
                if held or record.children:
                    if [*held] != record.children:
                        return False
                    stack += [child for child in held.values() if child is not None]
            return not stack and all(_contents(vars(ref())) == contents for ref, contents in self._configs)
        except UNSURE:
            return False


def _is_as_noted(state: dict[str, Any], record: _Record) -> bool:
    """Whether the attributes of a module are those of its record; no more is touched than has to be, which is rarely in a
    processor's cache."""
    if state["_forward_hooks"] or state["_forward_pre_hooks"] or state.get("training") is not record.training:
        return False
    if record.scalars and [state[name] for name in record.scalars] != record.values:
        return False
    if getattr(record.kind, "forward", None) is not record.forward:
        return False
    for name, ref in record.objects:
        if ref() is not state[name]:
            return False
    if record.contents and any(_contents(state[name]) != value for name, value in record.contents):
        return False
    # Those of one device never have the address of another's.
    parameters, buffers, place = state["_parameters"], state["_buffers"], 0
    for held in (parameters, buffers) if buffers else (parameters,) if parameters else ():
        for tensor in held.values():
            if tensor is None:
                continue
            if place == len(record.tensors):
                return False
            kind, address, shape, stride, dtype = record.tensors[place]
            if type(tensor) is not kind or tensor.data_ptr() != address or tensor.dtype is not dtype:
                return False
            if tensor.shape != shape or tensor.stride() != stride:
                return False
            place += 1
    return place == len(record.tensors)


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


def _record(module: nn.Module, configs: dict[int, Any]) -> _Record:
    state, kind = vars(module), type(module)
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
    return _Record(
        kind, getattr(kind, "forward", None), len(state), state.get("training"), [*scalars], [*scalars.values()], objects,
        contents, _tensors(state), [*state["_modules"]],
    )  # fmt: skip


def _reference(value: Any) -> weakref.ref[Any]:
    try:
        return weakref.ref(value)
    except TypeError:
        raise _UnsureError from None


def _tensors(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    found = []
    for held in (state["_parameters"], state["_buffers"]):
        for tensor in held.values():
            if tensor is None:
                continue
            # Of tensors without an address, nothing would tell two devices apart.
            if type(tensor) not in PLAIN or ZERO_STATUS in tensor.__dict__ or not tensor.data_ptr():
                raise _UnsureError
            found.append((type(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))
    return found


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
