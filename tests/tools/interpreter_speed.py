"""Shortcuts through Triton's CPU interpreter, whose time goes into types: no number of a kernel's goes through them.

For each value it makes a type, of a few that there are, and looks through that once more for each operation.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_make_tensor = tl.tensor.__init__
_make_block_type = tl.block_type.__init__
_are_equal = tl.dtype.__eq__
_broadcast = TritonSemantic.broadcast_impl_value
_computation_type = TritonSemantic.computation_type_impl
_np_dtype_of = interpreter._get_np_dtype
_unwrap = tl.core._unwrap_if_constexpr

# By the name of their elements and their shape.
_block_types: dict[tuple[Any, ...], Any] = {}
# What is no constexpr, and holds none.
_PLAIN = {int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type}
# NumPy's types by the names of Triton's.
_np_dtypes: dict[str, np.dtype] = {}


def hasten() -> None:
    """Patches the interpreter, in a process that compiles nothing."""
    tl.block_type.__new__ = _known_block_type
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
    tl.dtype.__eq__ = _equal
    TritonSemantic.broadcast_impl_value = _broadcast_impl_value
    TritonSemantic.computation_type_impl = _computation_type_impl
    interpreter._get_np_dtype = _get_np_dtype
    tl.core._unwrap_if_constexpr = _unwrap_if_constexpr


def _known_block_type(cls: type, element_ty: Any, shape: Any) -> Any:
    """The same object for the same elements and shape."""
    key = (element_ty.name, *_sizes(shape))
    if key not in _block_types:
        _block_types[key] = object.__new__(cls)
    return _block_types[key]


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    # Last of all, so that a shape that is refused is refused again.
    if "numel" not in self.__dict__:
        _make_block_type(self, element_ty, shape)


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """All but the handle follows from the type."""
    known = type.__dict__.get("_of_tensors")
    if known is None:
        _make_tensor(self, handle, type)
        type._of_tensors = {name: value for name, value in vars(self).items() if name != "handle"}
    else:
        self.__dict__.update(known)
        self.handle = handle


def _sizes(shape: Any) -> Any:
    """What is in a tuple of Triton's, without going through its own iterator."""
    return shape.values if isinstance(shape, tl.tuple) else shape


def _unwrap_if_constexpr(o: Any) -> Any:
    return o if type(o) in _PLAIN else _unwrap(o)


def _equal(self: Any, other: Any) -> bool:
    return self is other or _are_equal(self, other)


def _broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
    one, other = lhs.type, rhs.type
    if one is other or (one.is_block() and other.is_block() and _sizes(one.shape) == _sizes(other.shape)):
        return lhs, rhs
    return _broadcast(self, lhs, rhs)


@functools.cache
def _computation_type_impl(self: Any, *types: Any) -> Any:
    return _computation_type(self, *types)


def _get_np_dtype(tt_dtype: Any) -> np.dtype:
    name = tt_dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype_of(tt_dtype)
    return _np_dtypes[name]
