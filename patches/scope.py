"""`PatchScope`: attribute writes that can be taken back, last first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True)
class Write:
    """One attribute write on one object, and what stood there before."""

    target: Any
    name: str
    value: Any
    before: Any

    def apply(self) -> None:
        """Write the new value."""
        setattr(self.target, self.name, self.value)

    def undo(self) -> None:
        """Write the old value back, or remove the attribute that was not there."""
        if self.before is _MISSING:
            delattr(self.target, self.name)
        else:
            setattr(self.target, self.name, self.before)


class PatchScope:
    """Records writes of instance attributes (and of `__class__`), to undo them all."""

    def __init__(self) -> None:
        self._writes: list[Write] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Write `value` to `target.name` and remember what was there."""
        before = type(target) if name == "__class__" else vars(target).get(name, _MISSING)
        write = Write(target, name, value, before)
        write.apply()
        self._writes.append(write)

    def undo(self) -> None:
        """Take all writes back, last first."""
        while self._writes:
            self._writes.pop().undo()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """As if nothing had been written, inside the block."""
        for write in reversed(self._writes):
            write.undo()
        try:
            yield
        finally:
            for write in self._writes:
                write.apply()

    def original_vars(self, target: Any) -> dict[str, Any]:
        """A copy of `vars(target)` without our writes."""
        state = dict(vars(target))
        for write in reversed(self._writes):
            if write.target is target and write.name != "__class__":
                if write.before is _MISSING:
                    state.pop(write.name, None)
                else:
                    state[write.name] = write.before
        return state
