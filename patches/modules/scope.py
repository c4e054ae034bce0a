"""`PatchScope`: attribute writes that can be taken back, last first."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any, cast

_MISSING = object()


@dataclass(frozen=True)
class Write:
    """One attribute write on one object, and what stood there before.

    Attributes:
        reference: to the object. A weak one: the object may keep the scope, and is to be freed with its last user.
    """

    reference: weakref.ref[Any]
    name: str
    value: Any
    before: Any

    def undo(self) -> None:
        """Write the old value back, or remove the attribute that was not there; what others wrote since stays."""
        target = self.reference()
        if target is None:
            return
        if self.name == "__class__":
            target.__class__ = replaced(cast(Any, type(target)), self.value, self.before)
        elif vars(target).get(self.name) is not self.value:
            return
        elif self.before is _MISSING:
            delattr(target, self.name)
        else:
            setattr(target, self.name, self.before)


@functools.cache
def replaced(kind: Any, ours: Any, theirs: Any) -> Any:
    """`kind`, with class `theirs` in place of class `ours` wherever it comes from that one."""
    if kind is ours or not issubclass(kind, ours):
        return theirs if kind is ours else kind
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, tuple(replaced(base, ours, theirs) for base in kind.__bases__), own)


class PatchScope:
    """Records writes of instance attributes (and of `__class__`), to undo them all."""

    def __init__(self) -> None:
        self._writes: list[Write] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        """Write `value` to `target.name` and remember what was there."""
        before = type(target) if name == "__class__" else vars(target).get(name, _MISSING)
        # Noted first: an interrupt in between leaves a note of a write that was not made, which is undone as nothing.
        self._writes.append(Write(weakref.ref(target), name, value, before))
        setattr(target, name, value)

    def undo(self) -> None:
        """Take all writes back, last first."""
        while self._writes:
            self._writes.pop().undo()

    def targets(self) -> list[Any]:
        """The objects that were written to and still exist, each once, first ones first."""
        targets = (write.reference() for write in self._writes)
        return list({id(target): target for target in targets if target is not None}.values())
