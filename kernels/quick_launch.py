"""Launches without Triton's binder, which takes the host several times as long as the launch itself.

Triton looks at all arguments of a launch (types, alignment, whether a number is 1 or a multiple of 16) to find the compiled
kernel. Here the compiled kernel of an earlier launch is found by what these depend on, and called.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.runtime import JITFunction, driver

from hf_fastattn.kernels.carve_out import prefer_shared_memory
from hf_fastattn.kernels.launch import TESTED
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.relaunch import ALIGNMENT

# Kernels that are remembered, one for each combination of numbers: forgotten all at once, since few forwards fill them.
MOST_KNOWN = 4096


class _Known:
    """Compiled kernels, and what follows the arguments when they are called, for one driver."""

    driver: Any = None
    kernels: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def is_known_version() -> bool:
    """Whether Triton is of a version that was tried; with others launches are plain, and ask for no division of memory."""
    return triton.__version__.startswith(TESTED)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any], *, carve_out: int | None = None
) -> None:  # fmt: skip
    """Launch a kernel on the current device.

    Args:
        kernel: the `@triton.jit` function.
        grid: its programs.
        arguments: tensors, numbers and None in the order of its parameters, up to the compile-time constants. The first is a
            tensor.
        options: all these constants by name, and Triton's options.
        carve_out: per cent of a multiprocessor's memory that are to be shared memory; see `carve_out.py`.
    """
    taken = prepared(kernel)
    if taken is not kernel or not isinstance(kernel, JITFunction) or not is_known_version():
        # The interpreter compiles nothing, and has no driver.
        taken[grid](*arguments, **options)
        return
    if _Known.driver is not driver.active or len(_Known.kernels) > MOST_KNOWN:
        _Known.driver, _Known.kernels = driver.active, {}
    key = (kernel, arguments[0].device, *map(_look, arguments), *options.items())
    known = _Known.kernels.get(key)
    if known is not None:
        known[0][(*grid, 1, 1)[:3]](*arguments, *known[1])
        return
    if carve_out is not None:
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        # Reading this attribute loads the kernel.
        if compiled.run is not None:
            prefer_shared_memory(compiled.function, carve_out)
    compiled = kernel[grid](*arguments, **options)
    names = [parameter.name for parameter in kernel.params[len(arguments) :]]
    _Known.kernels[key] = compiled, tuple(options[name] for name in names)


def _look(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNMENT == 0
    # Numbers that are not integers are not looked at.
    return float if isinstance(argument, float) else argument
