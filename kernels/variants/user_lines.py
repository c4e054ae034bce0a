"""Where in a user's function something happened: for errors that name the line."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch.fx import traceback as fx_traceback
from torch.overrides import TorchFunctionMode

# Of what these give, a trace would keep the values that it was made with.
LEAVE_PYTORCH = ("numpy", "__array__", "tolist", "data_ptr")
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def line_of(frames: Iterable[tuple[CodeType, int]]) -> str:
    """The first of `frames`, innermost first, that is neither PyTorch's nor ours, as `file.py:12: the line`."""
    for code, number in frames:
        if not code.co_filename.startswith(_NOT_THE_USERS):
            text = linecache.getline(code.co_filename, number).strip()
            return f"{Path(code.co_filename).name}:{number}" + (f": {text}" if text else "")
    return ""


def line_of_error(error: BaseException) -> str:
    """The line of the user's function at which `error` was raised."""
    found: list[tuple[CodeType, int]] = []
    step: TracebackType | None = error.__traceback__
    while step is not None:
        found.append((step.tb_frame.f_code, step.tb_lineno))
        step = step.tb_next
    return line_of(reversed(found))


class NotedLines(TorchFunctionMode):
    """While it is on, each operation that is traced knows its line (`node.stack_trace`), and in-place writes are refused."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        line = line_of(_callers(sys._getframe(1)))
        fx_traceback.set_stack_trace([line])
        name = getattr(func, "__name__", "")
        if _writes_in_place(name) or (kwargs or {}).get("out") is not None:
            raise InPlaceWriteError(f"{name} writes to a tensor in place")
        if name in LEAVE_PYTORCH:
            raise LeavesPyTorchError(f"{name}() takes the value of a tensor out of PyTorch, where it cannot be followed")
        return func(*args, **(kwargs or {}))


class InPlaceWriteError(RuntimeError):
    """A hook wrote to a tensor."""


class LeavesPyTorchError(RuntimeError):
    """A hook takes values where no trace follows them."""


def _writes_in_place(name: str) -> bool:
    operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return operator or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _callers(frame: FrameType | None) -> Iterable[tuple[CodeType, int]]:
    while frame is not None:
        yield frame.f_code, frame.f_lineno
        frame = frame.f_back
