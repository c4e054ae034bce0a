"""Ctrl-C at an exact place: before the n-th bytecode, or line, that the package runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import hf_fastattn

ROOTS = tuple(
    str(folder) + os.sep
    for name in (".", "kernels", "patches")
    for folder in {Path(hf_fastattn.__file__).parent / name, (Path(hf_fastattn.__file__).parent / name).resolve()}
)


class Interrupter:
    """Counts events in the package's files, and raises `KeyboardInterrupt` at number `at` (from 0)."""

    def __init__(self, at: int | None = None, event: str = "opcode") -> None:
        self.at, self.event, self.seen = at, event, 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if event != "call" or not frame.f_code.co_filename.startswith(ROOTS):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        return self._local

    def _local(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == self.event:
            self.seen += 1
            if self.seen - 1 == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._local


@contextmanager
def interrupted(at: int | None, event: str = "opcode") -> Iterator[Interrupter]:
    """What runs inside is interrupted at event number `at`, or only counted."""
    interrupter, before = Interrupter(at, event), sys.gettrace()
    sys.settrace(interrupter)
    try:
        yield interrupter
    finally:
        sys.settrace(before)


def assert_books_agree(model: Any) -> None:
    """Every page that is held has its owners, and no call or page is left."""
    runtime = model._fastattn.runtime
    assert hf_fastattn.report(model).pages_in_use == 0
    assert runtime._calls == [] and not runtime.looping and not runtime.prefilling
    for group in runtime.groups:
        pool = group.pool
        assert not pool.unsettled and sum(pool._held) == sum(pool._owners) == pool.in_use == 0
        assert len(pool._held) == len(pool._owners)
