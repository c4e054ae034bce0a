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

from hf_fastattn.kernels.compile_aside import Aside, can_fork
from hf_fastattn.kernels.launch import TESTED

logger = logging.getLogger("hf_fastattn")

# Reading a kernel's source does hold the lock, a quarter of the time: with more threads the slowest one would wait longer.
MOST_THREADS = 6
# At a time; each takes a core and some 200 MB.
MOST_PROCESSES = 32
# Where launches are of compiled kernels; tests add the CPU.
DEVICES = ("cuda",)
# Of this thread alone: what others launch meanwhile is launched. A list takes the launches; None if nothing is rehearsed.
_rehearses: ContextVar[list[Callable[[], Any]] | bool | None] = ContextVar("hf_fastattn_rehearses", default=None)


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
    """A kernel in a rehearsal: `kernel[grid](...)` has it compiled for these arguments, and launches nothing.

    Args:
        notes: takes what would compile it, if that is to be done later.
    """

    def __init__(self, kernel: Any, notes: list[Callable[[], Any]] | None = None) -> None:
        self.kernel, self._notes = kernel, notes

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def compile_for(*arguments: Any, **options: Any) -> None:
            run = functools.partial(self.kernel.run, *arguments, grid=grid, warmup=True, **options)
            if self._notes is None:
                run()
            else:
                self._notes.append(run)

        return compile_for


def prepared(kernel: Any) -> Any:
    """The `@triton.jit` function, as every launcher has to take it: launched by `prepared(kernel)[grid](...)`."""
    rehearses = _rehearses.get()
    return kernel if rehearses is None else Rehearsed(kernel, rehearses if isinstance(rehearses, list) else None)


def is_under_way() -> bool:
    """Whether this thread rehearses."""
    return _rehearses.get() is not None


def noted(run: Callable[[], Any]) -> list[Callable[[], Any]]:
    """What `run` launches, of which nothing is launched or compiled: calls that compile it, for `compile_behind`."""
    notes: list[Callable[[], Any]] = []
    before = _rehearses.set(notes)
    try:
        run()
    finally:
        _rehearses.reset(before)
    return notes


def compile_behind(device: torch.device, notes: list[Callable[[], Any]]) -> threading.Thread | None:
    """Have what was noted compiled in processes of their own, the last first, and go on meanwhile; None where none can be.

    The thread calls no device: others may be capturing a graph. It is not waited for when Python ends.
    """
    if not can_fork():
        return None
    thread = threading.Thread(target=_compile_behind, args=(device, notes), name="hf_fastattn compiles ahead", daemon=True)
    thread.start()
    return thread


def _compile_behind(device: torch.device, notes: list[Callable[[], Any]]) -> None:
    try:
        identify_compiler().join()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            found = _asked_for(notes)
        aside = Aside()
        for key, compile_kernel in reversed(found):
            aside.compile(key, functools.partial(_beside_launcher, compile_kernel))
    except Exception as error:
        # Whoever launches them finds the same fault, or there is none.
        logger.info("hf_fastattn could not compile ahead: %s: %s", type(error).__name__, error)


def _asked_for(notes: list[Callable[[], Any]]) -> list[tuple[str, Callable[[], Any]]]:
    """Triton's keys of the kernels that calls compile, and what does so."""
    from triton.runtime._async_compile import AsyncCompileMode

    found: list[tuple[str, Callable[[], Any]]] = []

    class Mode(AsyncCompileMode):
        def submit(self, key: str, compile_kernel: Callable[[], Any], *finish: Any) -> Any:
            found.append((key, compile_kernel))

    with Mode(None):
        for note in notes:
            note()
    return found


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_rehearse() -> bool:
    """Whether kernels are compiled, by a version of Triton whose threads were tried, and nobody else compiles ahead."""
    if knobs.runtime.interpret or not triton.__version__.startswith(TESTED) or processors() < 2:
        return False
    from triton.runtime._async_compile import active_mode

    return active_mode.get() is None and _rehearses.get() is None


@functools.cache
def identify_compiler() -> threading.Thread:
    """A thread that has Triton look at itself, once a process: files of 500 MB are read for the names of kernels on disk."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    def look(at: Callable[[], Any]) -> None:
        try:
            at()
        except Exception as error:
            # The first kernel finds the same fault, or there is none.
            logger.debug("hf_fastattn could not look at Triton ahead: %s: %s", type(error).__name__, error)

    def run() -> None:
        # The assembler is asked for its version in a process of its own, and takes as long as the files.
        files = threading.Thread(target=look, args=(triton_key,), name="hf_fastattn reads Triton", daemon=True)
        files.start()
        look(lambda: make_backend(driver.active.get_current_target()).hash())
        files.join()

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
