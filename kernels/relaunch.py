"""A kernel launched again and again with other tensors of the same shapes and strides, as by the layers of one forward.

Triton binds all arguments anew for every launch, which takes the host several times as long as the launch itself. What
the binder looks at (types, alignment, divisibility) is the same for these launches, so that the compiled kernel is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor

from hf_fastattn.kernels.launch import TESTED
from hf_fastattn.kernels.rehearsal import prepared

# Triton compiles one kernel for pointers that are multiples of this, and another for all others.
ALIGNMENT = 16


@dataclass
class Launch:
    """One launch, which `again` repeats.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: its programs.
        arguments: in the order of its parameters, up to the compile-time constants.
        options: these constants by name, and Triton's options.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    _compiled: Any = None
    _call: Callable[..., Any] | None = None
    _rest: tuple[Any, ...] = ()

    def first(self) -> None:
        """Launch it."""
        self._compiled = prepared(self.kernel)[self.grid](*self.arguments, **self.options)

    def again(self, *tensors: Tensor) -> None:
        """Launch it with these in place of its first arguments, of the same types, strides and device."""
        if self._call is None:
            self._prepare(len(tensors))
        if self._call is not None and _aligned(tensors):
            self._call(*tensors, *self._rest)
        else:
            prepared(self.kernel)[self.grid](*tensors, *self.arguments[len(tensors) :], **self.options)

    def _prepare(self, replaced: int) -> None:
        # The interpreter compiles nothing.
        known = self._compiled is not None and triton.__version__.startswith(TESTED)
        if known and _aligned(self.arguments[:replaced]):
            names = _constants(self.kernel, len(self.arguments))
            self._rest = self.arguments[replaced:] + tuple(self.options[name] for name in names)
            self._call = self._compiled[(*self.grid, 1, 1)[:3]]
        # The first tensors need not live as long as this.
        self.arguments = (None,) * replaced + self.arguments[replaced:]


@functools.cache
def _constants(kernel: Any, arguments: int) -> tuple[str, ...]:
    """Names of the parameters behind the first so many."""
    return tuple(parameter.name for parameter in kernel.params[arguments:])


def _aligned(tensors: tuple[Any, ...]) -> bool:
    return not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors)
