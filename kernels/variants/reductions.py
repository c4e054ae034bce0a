"""Sums, means and maxima of vectors: across the columns of a tile, or written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.kernels.variants.elementwise import elementwise
from hf_fastattn.kernels.variants.values import Body, Indices, Value, remembered, reshape

# A sum over one dimension of several is written out.
MOST_TERMS = 32


def _total(body: Body, x: Value, dims: list[int] | None, keep: bool, reduction: str, dtype: torch.dtype) -> Value:
    """The sum or the largest over `dims`: across the columns of the tile, or written out."""
    gone = sorted({dim % len(x.shape) for dim in dims} if dims else set(range(len(x.shape))))
    shape = tuple(1 if dim in gone else size for dim, size in enumerate(x.shape))
    left = shape if keep else tuple(size for dim, size in enumerate(x.shape) if dim not in gone)
    x = elementwise(body, "_to_copy", [x], {}, x.shape, dtype)
    if math.prod(shape) == 1:
        flat = reshape(body, x, (math.prod(x.shape),))
        return remembered(left, dtype, lambda index: _across(body, flat, reduction))
    terms = [()] if not gone else _tuples([x.shape[dim] for dim in gone])
    if len(terms) > MOST_TERMS:
        raise KeyError(f"{reduction} of {len(terms)} elements over some of the dimensions")

    def at(index: Indices) -> str:
        found = ""
        for term in terms:
            own = list(index)
            for dim, place in zip(gone, term, strict=True):
                own[dim] = place
            element = x.at(tuple(own))
            found = body.let(_combined(reduction, found, element)) if found else element
        return found

    return reshape(body, remembered(shape, dtype, at), left)


def _tuples(sizes: list[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in sizes:
        found = [(*before, place) for before in found for place in range(size)]
    return found


def _combined(reduction: str, a: str, b: str) -> str:
    return f"{a} + {b}" if reduction == "sum" else f"tl.maximum({a}, {b})"


def _across(body: Body, x: Value, reduction: str) -> str:
    """A reduction over the columns of a tile; `x` is a vector."""
    size = x.shape[0]
    place = columns(body, size)
    empty = "0.0" if reduction == "sum" else "float('-inf')"
    element = body.let(f"tl.where({place} < {size}, {x.at((place,))}, {empty})")
    whole = body.let(f"tl.broadcast_to({element}, (x.shape[0], {power_of_2(size)}))")
    return body.let(f"tl.{reduction}({whole}, 1)[:, None]")


def columns(body: Body, size: int) -> str:
    """The index of each column of a tile that is wide enough for `size` elements."""
    return body.let(f"tl.arange(0, {power_of_2(size)})[None, :]")


def _sum(body: Body, x: Value, dims: list[int] | None = None, keep: bool = False, *, dtype: torch.dtype) -> Value:
    return _total(body, x, dims, keep, "sum", dtype)


def _amax(body: Body, x: Value, dims: list[int] | None = None, keep: bool = False, *, dtype: torch.dtype) -> Value:
    return _total(body, x, dims, keep, "max", dtype)


def _mean(body: Body, x: Value, dims: list[int] | None = None, keep: bool = False, *, dtype: torch.dtype) -> Value:
    total = _total(body, x, dims, keep, "sum", dtype)
    return elementwise(body, "div", [total, math.prod(x.shape) / math.prod(total.shape)], {}, total.shape, dtype)


REDUCTIONS: dict[str, Callable[..., Value]] = {"sum": _sum, "mean": _mean, "amax": _amax}
