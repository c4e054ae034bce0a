"""Operations that choose, move or make elements, as changes of indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hf_fastattn.kernels.variants.values import Body, Index, Indices, Value, broadcast, cast, literal, remembered, reshape


def _slice(body: Body, x: Value, dim: int = 0, start: int | None = 0, stop: int | None = None, step: int = 1) -> Value:
    dim, size = dim % len(x.shape), x.shape[dim]
    begin, end, _ = slice(start, stop, step).indices(size)
    count = len(range(begin, end, step))

    def at(index: Indices) -> str:
        moved = body.plus(body.times(index[dim], step), begin)
        return x.at((*index[:dim], moved, *index[dim + 1 :]))

    return remembered((*x.shape[:dim], count, *x.shape[dim + 1 :]), x.dtype, at)


def _select(body: Body, x: Value, dim: int, place: int) -> Value:
    dim, place = dim % len(x.shape), place % x.shape[dim]
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    return remembered(shape, x.dtype, lambda index: x.at((*index[:dim], place, *index[dim:])))


def _permute(body: Body, x: Value, order: list[int]) -> Value:
    order = [dim % len(x.shape) for dim in order]

    def at(index: Indices) -> str:
        moved: list[Index] = [0] * len(order)
        for place, dim in enumerate(order):
            moved[dim] = index[place]
        return x.at(tuple(moved))

    return remembered([x.shape[dim] for dim in order], x.dtype, at)


def _transpose(body: Body, x: Value, a: int, b: int) -> Value:
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return _permute(body, x, order)


def _t(body: Body, x: Value) -> Value:
    return _transpose(body, x, 0, 1) if len(x.shape) == 2 else x


def _flip(body: Body, x: Value, dims: list[int]) -> Value:
    flipped = {dim % len(x.shape) for dim in dims}

    def at(index: Indices) -> str:
        moved = (
            body.plus(body.times(i, -1), size - 1) if dim in flipped else i
            for dim, (i, size) in enumerate(zip(index, x.shape, strict=True))
        )
        return x.at(tuple(moved))

    return remembered(x.shape, x.dtype, at)


def _cat(body: Body, parts: list[Value], dim: int = 0) -> Value:
    dim = dim % len(parts[0].shape)
    sizes = [part.shape[dim] for part in parts]
    dtype = _common([part.dtype for part in parts])

    def at(index: Indices) -> str:
        place, end = index[dim], sum(sizes)
        chosen = ""
        for part, size in reversed(list(zip(parts, sizes, strict=True))):
            end -= size
            own = (*index[:dim], body.plus(place, -end), *index[dim + 1 :])
            if isinstance(place, int):
                if end <= place < end + size:
                    return cast(body, part.at(own), part.dtype, dtype)
                continue
            element = cast(body, part.at(own), part.dtype, dtype)
            chosen = body.let(f"tl.where({place} < {end + size}, {element}, {chosen})") if chosen else element
        return chosen

    return remembered((*parts[0].shape[:dim], sum(sizes), *parts[0].shape[dim + 1 :]), dtype, at)


def _stack(body: Body, parts: list[Value], dim: int = 0) -> Value:
    dim = dim % (len(parts[0].shape) + 1)
    shape = parts[0].shape
    return _cat(body, [reshape(body, part, (*shape[:dim], 1, *shape[dim:])) for part in parts], dim)


def _common(dtypes: list[torch.dtype]) -> torch.dtype:
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    return found


def _roll(body: Body, x: Value, shifts: list[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        flat = _roll(body, reshape(body, x, (math.prod(x.shape),)), shifts, [0])
        return reshape(body, flat, x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        cut = (x.shape[dim] - shift) % x.shape[dim]
        x = _cat(body, [_slice(body, x, dim, cut), _slice(body, x, dim, 0, cut)], dim) if cut else x
    return x


def _split(body: Body, x: Value, sizes: int | list[int], dim: int = 0) -> list[Value]:
    if isinstance(sizes, int):
        sizes = [min(sizes, x.shape[dim] - begin) for begin in range(0, x.shape[dim], sizes)]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [_slice(body, x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _unbind(body: Body, x: Value, dim: int = 0) -> list[Value]:
    return [_select(body, x, dim, place) for place in range(x.shape[dim])]


def _repeat(body: Body, x: Value, repeats: list[int]) -> Value:
    shape = [1] * (len(repeats) - len(x.shape)) + list(x.shape)

    def at(index: Indices) -> str:
        own = tuple(body.rest(i, size) for i, size in zip(index, shape, strict=True))
        return x.at(own[len(own) - len(x.shape) :])

    return remembered([n * size for n, size in zip(repeats, shape, strict=True)], x.dtype, at)


def _index(body: Body, x: Value, indices: list[Value | None]) -> Value:
    """`x[i, j]`: a negative index counts from the end, as in PyTorch."""
    known = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(index.dtype == torch.bool for _, index in known):
        raise KeyError("index by a mask")
    first, last = known[0][0], known[-1][0]
    together = last - first + 1 == len(known)
    picked = torch.broadcast_shapes(*(index.shape for _, index in known))
    others = [size for dim, size in enumerate(x.shape) if dim not in dict(known)]
    begin = first if together else 0
    shape = (*others[:begin], *picked, *others[begin:])

    def at(index: Indices) -> str:
        inner = index[begin : begin + len(picked)]
        rest = iter((*index[:begin], *index[begin + len(picked) :]))
        own = [next(rest) if dim not in dict(known) else 0 for dim in range(len(x.shape))]
        for dim, chosen in known:
            name, size = chosen.at(broadcast(inner, chosen.shape)), x.shape[dim]
            own[dim] = body.let(f"tl.where({name} < 0, {name} + {size}, {name})")
        return x.at(tuple(own))

    return remembered(shape, x.dtype, at)


def _index_select(body: Body, x: Value, dim: int, index: Value) -> Value:
    return _index(body, x, [None] * (dim % len(x.shape)) + [index])


def _arange(body: Body, start: int, stop: int, step: int, dtype: torch.dtype) -> Value:
    def at(index: Indices) -> str:
        place = body.plus(body.times(index[0], step), start)
        return body.let(literal(place, dtype) if isinstance(place, int) else f"{place}.to(tl.int64)")

    return remembered((len(range(start, stop, step)),), dtype, at)


VIEWS: dict[str, Callable[..., Any]] = {
    "slice": _slice,
    "select": _select,
    "permute": _permute,
    "transpose": _transpose,
    "t": _t,
    "flip": _flip,
    "cat": _cat,
    "stack": _stack,
    "roll": _roll,
    "split": _split,
    "split_with_sizes": _split,
    "unbind": _unbind,
    "repeat": _repeat,
    "index": _index,
    "index_select": _index_select,
}
# The same elements in the result's shape.
RESHAPES = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias", "detach", "lift_fresh", "lift_fresh_copy")
CONSTANTS = ("full", "full_like", "scalar_tensor", "zeros", "zeros_like", "ones", "ones_like")


def constant(body: Body, name: str, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Value:
    """What `torch.full`, `torch.zeros` and the like make."""
    number = 0 if name.startswith("zeros") else 1 if name.startswith("ones") else args[0 if name == "scalar_tensor" else 1]
    return remembered(shape, dtype, lambda index: body.let(literal(number, dtype)))


def arange(body: Body, args: tuple[Any, ...], dtype: torch.dtype) -> Value:
    """`torch.arange` of integers."""
    start, stop = (0, args[0]) if len(args) == 1 else args[:2]
    return _arange(body, start, stop, args[2] if len(args) > 2 else 1, dtype)


def expand(body: Body, x: Value, shape: tuple[int, ...]) -> Value:
    """`x` broadcast to `shape`."""
    return remembered(shape, x.dtype, lambda index: x.at(broadcast(index, x.shape)))
