"""Inside `uncompiled()` what torch.compile made runs as it was written.

Our forwards launch kernels of their own, count, and may be recorded: compiled code around or inside them would be compiled
anew at every size, or record graphs of its own.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

_lock = threading.Lock()
# How many are inside, and what takes the stance back: it is one for all threads.
_inside: list[Any] = [0, None]


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled functions called inside, in any thread, run eagerly; nothing changes inside of a compiled one."""
    if "torch._dynamo" not in sys.modules or not _enter():
        yield
        return
    try:
        yield
    finally:
        _leave()


def _enter() -> bool:
    with _lock:
        if not _inside[0]:
            try:
                _inside[1] = torch.compiler.set_stance("force_eager")
            except RuntimeError:
                # A compiled function called us, and decides for itself.
                return False
        _inside[0] += 1
        return True


def _leave() -> None:
    with _lock:
        _inside[0] -= 1
        if not _inside[0]:
            _inside[1].__exit__(None, None, None)
            _inside[1] = None
