"""`Spans`: stretches of work by threads, each as long as its token exists."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field


class Token:
    """Exists while the work of its `Span` is under way."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False)
class Span:
    """Something under way in one thread.

    Attributes:
        thread: its identifier.
        token: gone when it is over.
        tired: threads that have waited in vain for this span to end.
    """

    thread: int
    token: Callable[[], Token | None]
    tired: set[int] = field(default_factory=set)

    @property
    def is_mine(self) -> bool:
        """Whether it is under way in this thread."""
        return self.thread == threading.get_ident() and self.token() is not None


class Spans:
    """What is under way in any thread, the oldest first."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def open(self) -> Token:
        """Something begins in this thread: it is over when the token is gone, which no variable should hold."""
        box = [Token()]
        try:
            self._forget_ended()
            self._spans.append(Span(threading.get_ident(), weakref.ref(box[0])))
            return box.pop()
        except BaseException:
            # A traceback may hold this frame for long.
            box.clear()
            raise

    def has_mine(self) -> bool:
        """Whether something is under way in this thread."""
        return bool(self._spans) and any(span.is_mine for span in tuple(self._spans))

    def has_any(self) -> bool:
        """Whether something is under way in any thread."""
        return any(span.token() is not None for span in tuple(self._spans))

    def _forget_ended(self) -> None:
        for span in tuple(self._spans):
            if span.token() is None:
                self._remove(span)

    def _remove(self, span: Span) -> None:
        # Another thread may have found it first; only the removal itself tells.
        try:
            self._spans.remove(span)
        except ValueError:
            return
