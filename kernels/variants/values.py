"""Tensors of a traced hook as what Triton computes of them: the element at given indices.

A hook works on scalars or on vectors of head_dim. In Triton all pairs of a tile are computed at once, so that a scalar is a
block `[M, N]`, `[M, 1]`, `[1, N]` or a number, and an index is an integer or the name of such a block. Slices, halves,
concatenations and views only change indices ("index propagation").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Index = int | str
Indices = tuple[Index, ...]

TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}


@dataclass
class Body:
    """The lines of a Triton function; an expression that comes up twice is computed once."""

    lines: list[str] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)

    def let(self, expression: str) -> str:
        """The name of `expression`."""
        if expression not in self._names:
            self._names[expression] = f"v{len(self._names)}"
            self.lines.append(f"{self._names[expression]} = {expression}")
        return self._names[expression]

    def plus(self, index: Index, number: int) -> Index:
        if isinstance(index, int):
            return index + number
        return self.let(f"{index} + {number}") if number else index

    def times(self, index: Index, number: int) -> Index:
        if isinstance(index, int):
            return index * number
        return 0 if number == 0 else self.let(f"{index} * {number}") if number != 1 else index

    def sum_of(self, a: Index, b: Index) -> Index:
        if isinstance(a, int):
            return self.plus(b, a)
        return self.plus(a, b) if isinstance(b, int) else self.let(f"{a} + {b}")

    def quotient(self, index: Index, number: int) -> Index:
        """`index // number` of an index that is not negative."""
        if isinstance(index, int):
            return index // number
        return self.let(f"{index} // {number}") if number != 1 else index

    def rest(self, index: Index, number: int) -> Index:
        if isinstance(index, int):
            return index % number
        return self.let(f"{index} % {number}") if number != 1 else 0


@dataclass(frozen=True)
class Value:
    """One tensor of the graph.

    Attributes:
        shape: as PyTorch's.
        dtype: of what `at` names.
        at: the name of the element at given indices, one a dimension.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    at: Callable[[Indices], str]


def remembered(shape: Sequence[int], dtype: torch.dtype, at: Callable[[Indices], str]) -> Value:
    """A `Value` that computes an element once, however often it is read."""
    known: dict[Indices, str] = {}

    def element(index: Indices) -> str:
        if index not in known:
            known[index] = at(index)
        return known[index]

    return Value(tuple(shape), dtype, element)


def literal(number: float | int | bool, dtype: torch.dtype) -> str:
    """A constant as an expression of Triton's type, and of Gluon's."""
    if dtype == torch.bool:
        return f"tl.cast({bool(number)}, tl.int1)"
    if dtype.is_floating_point:
        number = float(number)
        text = repr(number) if math.isfinite(number) else f"float('{number}')"
    else:
        text = repr(int(number))
    # A cast would round a number to fp32 first.
    return f"tl.full([], {text}, {TYPES[dtype]})" if dtype == torch.float64 else f"tl.cast({text}, {TYPES[dtype]})"


def cast(body: Body, name: str, have: torch.dtype, want: torch.dtype) -> str:
    """`name`, of dtype `have`, as `want`."""
    if have == want:
        return name
    return body.let(f"{name} != 0") if want == torch.bool else body.let(f"{name}.to({TYPES[want]})")


def broadcast(index: Indices, shape: Sequence[int]) -> Indices:
    """The indices into a tensor of `shape` that is broadcast to one which `index` points into."""
    own = index[len(index) - len(shape) :]
    return tuple(0 if size == 1 else i for i, size in zip(own, shape, strict=True))


def reshape(body: Body, value: Value, shape: Sequence[int]) -> Value:
    """The same elements in another shape."""

    def at(index: Indices) -> str:
        linear: Index = 0
        for i, size in zip(index, shape, strict=True):
            linear = body.sum_of(body.times(linear, size), 0 if size == 1 else i)
        found: list[Index] = []
        for place, size in reversed(list(enumerate(value.shape))):
            found.append(0 if size == 1 else body.rest(linear, size) if any(s != 1 for s in value.shape[:place]) else linear)
            linear = body.quotient(linear, size)
        return value.at(tuple(reversed(found)))

    return remembered(shape, value.dtype, at)
