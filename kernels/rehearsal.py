"""Rehearsals: forwards whose launches are compiled instead of made, by several threads at once.

Triton compiles a kernel when it is first launched, one after the other. In a rehearsal each has a thread that has a process
compile it (`compile_aside.py`): what comes after waited for the slowest of its kernels, not for all of them. The same holds
for the launcher that Triton has a C compiler make for each list of arguments.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

from hf_fastattn.kernels.compile_aside import Aside
from hf_fastattn.kernels.launch import TESTED

logger = logging.getLogger("hf_fastattn")

# Reading a kernel's source does hold the lock, a quarter of the time: with more threads the slowest one would wait longer.
MOST_THREADS = 6
# At a time; each takes a core and some 200 MB.
MOST_PROCESSES = 32
# Where launches are of compiled kernels; tests add the CPU.
DEVICES = ("cuda",)
# Of this thread alone: what others launch meanwhile is launched.
_rehearses: ContextVar[bool] = ContextVar("hf_fastattn_rehearses", default=False)


def mode(threads: Executor) -> Any:
    """Triton's mode in which threads compile what launches ask for, each kernel in a process of its own where one helps."""
    from triton.runtime._async_compile import AsyncCompileMode

    aside, turns = Aside(), threading.BoundedSemaphore(MOST_THREADS)

    def compiled(key: str, compile_kernel: Callable[[], Any]) -> Any:
        aside.compile(key, functools.partial(_beside_launcher, compile_kernel))
        # From disk, if another process has compiled it.
        with contextlib.nullcontext() if aside.works else turns:
            return _with_launcher(compile_kernel)

    class Mode(AsyncCompileMode):
        def submit(self, key: str, compile_kernel: Callable[[], Any], *finish: Any) -> Any:
            return super().submit(key, functools.partial(compiled, key, compile_kernel), *finish)

    return Mode(threads)


def _with_launcher(compile_kernel: Callable[[], Any]) -> Any:
    kernel = compile_kernel()
    # The first launch finds it on disk: making it takes the C compiler as long as a small kernel takes Triton.
    driver.active.launcher_cls(kernel.src, kernel.metadata)
    return kernel


def _beside_launcher(compile_kernel: Callable[[], Any]) -> None:
    """The same, but the C compiler works while Triton does."""
    beside = threading.Thread(target=_guess_launcher, args=(compile_kernel,))
    beside.start()
    kernel = compile_kernel()
    beside.join()
    driver.active.launcher_cls(kernel.src, kernel.metadata)


def _guess_launcher(compile_kernel: Callable[[], Any]) -> None:
    """Make a launcher before the kernel is there: of what is not known yet, its C code depends on whether boxes go by TMA.

    It lies on disk by its code: one that was guessed wrongly is not found.
    """
    try:
        # Triton's function holds what it compiles.
        source = inspect.getclosurevars(compile_kernel).nonlocals["src"]
        boxes = sum(str(kind).startswith("tensordesc") for kind in source.signature.values())
        driver.active.launcher_cls(source, SimpleNamespace(tensordesc_meta=[{}] * boxes))
    except Exception as error:
        # As soon as its code is compiled, it asks for what is not known; another Triton may keep things elsewhere.
        logger.debug("hf_fastattn has made a launcher as far as %s: %s", type(error).__name__, error)


class Rehearsed:
    """A kernel in a rehearsal: `kernel[grid](...)` has it compiled for these arguments, and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_for(*arguments: Any, **options: Any) -> None:
            self.kernel.run(*arguments, grid=grid, warmup=True, **options)

        return compile_for


def prepared(kernel: Any) -> Any:
    """The `@triton.jit` function, as every launcher has to take it: launched by `prepared(kernel)[grid](...)`."""
    return Rehearsed(kernel) if _rehearses.get() else kernel


def is_under_way() -> bool:
    """Whether this thread rehearses."""
    return _rehearses.get()


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_rehearse() -> bool:
    """Whether kernels are compiled, by a version of Triton whose threads were tried, and nobody else compiles ahead."""
    if knobs.runtime.interpret or not triton.__version__.startswith(TESTED) or processors() < 2:
        return False
    from triton.runtime._async_compile import active_mode

    return active_mode.get() is None and not _rehearses.get()


@functools.cache
def identify_compiler() -> threading.Thread:
    """A thread that has Triton look at itself, once a process: files of 500 MB are read for the names of kernels on disk."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    def run() -> None:
        try:
            triton_key()
            make_backend(driver.active.get_current_target()).hash()
        except Exception as error:
            # The first kernel finds the same fault, or there is none.
            logger.debug("hf_fastattn could not look at Triton ahead: %s: %s", type(error).__name__, error)

    thread = threading.Thread(target=run, name="hf_fastattn identifies Triton", daemon=True)
    thread.start()
    return thread


def compile_ahead(device: torch.device, run: Callable[[], Any]) -> None:
    """Have the kernels compiled that `run` launches on the device, if that can be done ahead; see `rehearsal`."""
    if device.type not in DEVICES or not can_rehearse():
        return
    try:
        with rehearsal():
            run()
    except Exception as error:
        # Whoever launches them next finds the same fault, or there is none.
        logger.info("hf_fastattn could not compile ahead: %s: %s", type(error).__name__, error)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Launches inside, of this thread, are not made; their kernels are compiled at the end. Ask `can_rehearse` before.

    Whatever launches would have written is arbitrary: nothing inside may read it but other launches, and the forward is to
    run again from the same inputs.
    """
    from triton.runtime._async_compile import active_mode

    identify_compiler().join()
    before = _rehearses.set(True)
    try:
        with ThreadPoolExecutor(min(processors(), MOST_PROCESSES)) as threads, mode(threads):
            yield
    finally:
        # Triton 3.6 leaves a mode on whose kernels did not all compile, and would hand its threads every later launch.
        active_mode.set(None)
        _rehearses.reset(before)
