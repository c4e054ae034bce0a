"""Kernels of a forward compiled all at once, in threads, before it runs: otherwise each waits for the one before it.

Triton compiles a kernel at its first launch, some tenths of a second to several seconds each, and leaves Python's lock for
most of that. So a forward is run once with launches that only ask for their kernels (`triton.AsyncCompileMode`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton
from triton.runtime import JITFunction, _async_compile

MOST_THREADS = 8
_asked_for: ContextVar[bool] = ContextVar("hf_fastattn_only_compiling", default=False)
# One forward at a time is run ahead; another thread's compiles as it launches.
_turn = threading.Lock()


def only_compiling() -> bool:
    """Whether launches of this thread compile, and compute nothing."""
    return _asked_for.get()


def compile_ahead(run: Callable[[], Any]) -> None:
    """Compile what `run` launches.

    Args:
        run: a forward that may run again. What its kernels would write is not written, here and there: it is called with
            undefined values, and must not wait for any.

    Raises:
        Exception: what `run` or a compilation raises.
    """
    if not _turn.acquire(blocking=False):
        return
    try:
        if _async_compile.active_mode.get() is None:
            with _launches_that_compile(), ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
                with triton.AsyncCompileMode(threads):
                    run()
    finally:
        # Triton 3.6 leaves its mode on where a compilation fails.
        _async_compile.active_mode.set(None)
        _turn.release()


@contextmanager
def _launches_that_compile() -> Iterator[None]:
    held: list[tuple[Any, Any]] = []
    for kind in (JITFunction, *JITFunction.__subclasses__()):
        if "run" in vars(kind):
            held.append((kind, kind.run))
            kind.run = _compiling_run(kind.run)
    token = _asked_for.set(True)
    try:
        yield
    finally:
        _asked_for.reset(token)
        for kind, run in held:
            kind.run = run


def _compiling_run(run: Callable[..., Any]) -> Callable[..., Any]:
    def compiling(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # Other threads launch meanwhile.
        return run(self, *args, grid=grid, warmup=warmup or only_compiling(), **kwargs)

    return compiling
