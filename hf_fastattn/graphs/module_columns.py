"""`ModuleColumns`: what many modules are, attribute by attribute rather than module by module.

A call of Python for each of four hundred modules takes a millisecond before every prompt. The same attribute of all of
them is read and compared in one pass of the interpreter's own C, which takes a fifth of that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from operator import attrgetter, call, getitem, is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

STATE, SHAPE, DTYPE = attrgetter("__dict__"), attrgetter("shape"), attrgetter("dtype")
# What every module has that may hold something.
HELD = itemgetter("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class ModuleRecord(NamedTuple):
    """Attributes of one module's own.

    Attributes:
        scalars: numbers and the like, by name.
        objects: what is the same as long as it is the same object.
        contents: what holds values, in a form that can be compared.
    """

    scalars: dict[str, Any]
    objects: list[tuple[str, weakref.ref[Any]]]
    contents: list[tuple[str, Any]]


class ModuleColumns:
    """The modules from a root down; none of them, and no tensor, is held.

    Args:
        noted: the root, the modules below it, and what they are.
    """

    def __init__(self, noted: Sequence[tuple[nn.Module, ModuleRecord]]) -> None:
        modules = [module for module, _ in noted]
        states = [*map(STATE, modules)]
        self._modules = [weakref.ref(module) for module in modules]
        self._kinds, self._held = [*map(type, modules)], [*map(len, states)]
        self._modes = _modes(states)
        self._methods = {kind: _methods(kind) for kind in self._kinds}
        children, *tensors, _, _ = _held(states)
        self._inside = _Entries(children)
        self._children = [_nothing if child is None else weakref.ref(child) for child in self._inside.values(children)]
        self._scalars = _Scalars([record.scalars for _, record in noted])
        self._objects = _Own([record.objects for _, record in noted])
        self._contents = _Own([record.contents for _, record in noted])
        self._tensors = _Tensors(tensors)

    def hold(self, root: nn.Module, contents_of: Callable[[Any], Any]) -> bool:
        """Whether the modules from `root` down are those that were noted, and as they were.

        Args:
            contents_of: what holds values, in the form that it was noted in.

        Raises:
            AttributeError, KeyError: they are not.
        """
        # One that has gone is None, and has no state.
        modules = [*map(call, self._modules)]
        if not modules or modules[0] is not root:
            return False
        states = [*map(STATE, modules)]
        children, *tensors, hooks, hooks_before = _held(states)
        return (
            self._inside.hold(children)
            and all(map(is_, self._inside.values(children), map(call, self._children)))
            and [*map(type, modules)] == self._kinds
            and [*map(len, states)] == self._held
            and not any(hooks)
            and not any(hooks_before)
            and _modes(states) == self._modes
            and all(all(map(is_, _methods(kind), methods)) for kind, methods in self._methods.items())
            and self._scalars.hold(states)
            and all(map(is_, self._objects.now(states), map(call, self._objects.noted)))
            and [*map(contents_of, self._contents.now(states))] == self._contents.noted
            and self._tensors.hold(tensors)
        )


class _Entries:
    """The names that many dictionaries, most of them empty, have values by.

    Args:
        held: the dictionaries.
    """

    def __init__(self, held: Sequence[dict[str, Any]]) -> None:
        self._counts = [*map(len, held)]
        self._filled = [place for place, count in enumerate(self._counts) if count]
        self._names = [*chain.from_iterable(self._of(held))]

    def hold(self, held: Sequence[dict[str, Any]]) -> bool:
        """Whether dictionaries have the same names."""
        return [*map(len, held)] == self._counts and [*chain.from_iterable(self._of(held))] == self._names

    def values(self, held: Sequence[dict[str, Any]]) -> list[Any]:
        """The values of dictionaries that have the same names."""
        return [*chain.from_iterable(map(dict.values, self._of(held)))]

    def _of(self, held: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return map(held.__getitem__, self._filled)


class _Scalars:
    """Numbers and the like that modules have of their own.

    Args:
        noted: of each module, by name.
    """

    def __init__(self, noted: Sequence[dict[str, Any]]) -> None:
        self._places = [place for place, own in enumerate(noted) if own]
        # One for each combination of names, of which there are few.
        getters = {names: itemgetter(*names) for names in {tuple(noted[place]) for place in self._places}}
        self._getters = [getters[tuple(noted[place])] for place in self._places]
        self._noted = self._now(noted)

    def hold(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether they are what was noted.

        Raises:
            KeyError: one is no more.
        """
        return self._now(states) == self._noted

    def _now(self, states: Sequence[dict[str, Any]]) -> list[Any]:
        return [*map(call, self._getters, map(states.__getitem__, self._places))]


class _Own:
    """Attributes of one sort that modules have of their own.

    Args:
        noted: of each module the names, and what they are.
    """

    def __init__(self, noted: Sequence[Sequence[tuple[str, Any]]]) -> None:
        self._places = [place for place, own in enumerate(noted) for _ in own]
        self._names = [name for own in noted for name, _ in own]
        self.noted = [value for own in noted for _, value in own]

    def now(self, states: list[dict[str, Any]]) -> list[Any]:
        return [*map(getitem, map(states.__getitem__, self._places), self._names)]


class _Tensors:
    """The parameters and buffers of modules: their kinds, and where and how they lie.

    Args:
        held: of each module its parameters, and of each its buffers.
    """

    def __init__(self, held: Sequence[Sequence[dict[str, Any]]]) -> None:
        both = [*chain(*held)]
        self._entries = _Entries(both)
        tensors = self._entries.values(both)
        self._kinds = [*map(type, tensors)]
        self._lie = _lie(tensors)

    def hold(self, held: Sequence[Sequence[dict[str, Any]]]) -> bool:
        both = [*chain(*held)]
        if not self._entries.hold(both):
            return False
        tensors = self._entries.values(both)
        # Those of one device never have the address of another's.
        return [*map(type, tensors)] == self._kinds and _lie(tensors) == self._lie


def _lie(held: list[Any]) -> tuple[list[Any], ...]:
    tensors = [tensor for tensor in held if tensor is not None]
    lie = [*map(Tensor.data_ptr, tensors)], [*map(SHAPE, tensors)], [*map(Tensor.stride, tensors)], [*map(DTYPE, tensors)]
    return lie


def _held(states: list[dict[str, Any]]) -> list[Sequence[dict[str, Any]]]:
    """Of each module the modules in it, its parameters, its buffers, and its hooks after and before its forward."""
    return [*zip(*map(HELD, states), strict=True)] or [()] * 5


def _methods(kind: Any) -> tuple[Any, Any]:
    """What runs when a module of a class is called."""
    return getattr(kind, "forward", None), kind.__call__


def _modes(states: list[dict[str, Any]]) -> list[Any]:
    # What torch.compile put around a module has no mode of its own.
    return [*map(dict.get, states, repeat("training"))]


def _nothing() -> None:
    """In the place of a module where there is none."""
