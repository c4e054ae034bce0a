"""`Turn`: whose turn it is to change something that threads share, as a lock that no exception can leave taken.

A `with` block or a `finally` gives a lock back by statements of its own, and Ctrl-C may come between any two of them. A
turn lasts as long as a `Token`, which nobody but the evaluation stack of the frame that took it refers to:

    return (turn.take(seconds), work())[1]

However `work()` ends, the interpreter empties that stack, even where a traceback goes on holding the frame.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

# Seconds between two looks at whether the turn has come.
POLL = 0.001


class Token:
    """Exists while what it stands for is under way."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False)
class Span:
    """Something under way in one thread.

    Attributes:
        thread: its identifier.
        token: gone when it is over.
        tired: threads that have waited for it in vain.
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


class Turn(Spans):
    """It is the turn of the thread that came first, until what it took the turn for is over."""

    def is_mine(self) -> bool:
        """Whether it is this thread's turn."""
        # Of a list that other threads change: its first entry, if there is one.
        for first in self._spans[:1]:
            return first.thread == threading.get_ident() and first.token() is not None
        return False

    def take(self, seconds: float) -> Token | None:
        """Wait for the turn; `is_mine()` tells whether it came.

        Args:
            seconds: to wait at most; for something that this thread has waited for in vain before it waits no more.

        Returns:
            The turn is this thread's as long as the token exists, which no variable should hold; None if it is this
            thread's turn already, or another's still.
        """
        if self.is_mine():
            return None
        box = [Token()]
        span = Span(threading.get_ident(), weakref.ref(box[0]))
        try:
            self._spans.append(span)
            if self._wait(span, time.monotonic() + seconds):
                return box.pop()
            self._remove(span)
            return None
        except BaseException:
            box.clear()
            self._remove(span)
            raise

    def _wait(self, span: Span, deadline: float) -> bool:
        while True:
            first = next(iter(self._spans[:1]), None)
            if first is span:
                return True
            if first is None or first.token() is None:
                if first is not None:
                    self._remove(first)
                continue
            if time.monotonic() >= deadline or span.thread in first.tired:
                first.tired.add(span.thread)
                return False
            time.sleep(POLL)
