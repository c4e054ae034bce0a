"""accelerate's state is one a process: who asks for another mixed precision than a test before fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState


@contextmanager
def own_accelerator() -> Iterator[None]:
    """Inside, accelerate is as in a new process, and after it again."""
    AcceleratorState._reset_state(True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
