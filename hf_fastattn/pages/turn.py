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

from hf_fastattn.pages.spans import Span, Spans, Token

# Seconds between two looks at whether the turn has come.
POLL = 0.001


class Turn(Spans):
    """The thread at the head of the queue has the turn for as long as its token exists."""

    def is_mine(self) -> bool:
        """Whether it is this thread's turn."""
        # A slice, since other threads may empty the list meanwhile.
        for first in self._spans[:1]:
            return first.thread == threading.get_ident() and first.token() is not None
        return False

    def is_wanted(self) -> bool:
        """Whether another thread waits for the turn that this one has."""
        return len(self._spans) > 1

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
