"""What a function reads from outside when it is called: to notice that a name stands for another object than it did."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

NUMBERS = (bool, int, float, str)


def captured(function: Any) -> list[Any]:
    """The tensors, numbers and functions that `function` refers to by closures, globals, defaults and bound arguments.

    What lies deeper, as an attribute of an object or an entry of a list, is not looked for.
    """
    found: list[Any] = []
    functions, seen = [function], set()
    while functions:
        current = functions.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for value in _referred(current):
            found.append(value)
            if isinstance(value, types.FunctionType | functools.partial) and not _is_torchs(value):
                functions.append(value)
    return found


def same_objects(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether names stand for the same objects, or for equal numbers."""
    return len(before) == len(now) and all(_same(one, other) for one, other in zip(before, now, strict=True))


def _referred(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, types.MethodType):
        yield function.__func__
    elif isinstance(function, types.FunctionType):
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield from (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
        names: Mapping[str, Any] = function.__globals__
        yield from (names[name] for name in function.__code__.co_names if name in names and _counts(names[name]))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return bool([cell.cell_contents])
    except ValueError:
        # A name that is not bound yet.
        return False


def _counts(value: Any) -> bool:
    return isinstance(value, (Tensor, *NUMBERS, types.FunctionType, functools.partial))


def _is_torchs(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.")


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, NUMBERS) and type(one) is type(other) and one == other)
