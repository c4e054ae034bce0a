"""`LoopRouter`: outputs on their way to who asked for them, whatever becomes of the event loops that some wait in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from transformers.generation.continuous_batching.continuous_api import OutputRouter

# What is called in an event loop, and with which output.
Calls = list[tuple[Callable[[Any], None], Any]]


class LoopRouter(OutputRouter):
    """Transformers' router, of which each handler runs in its own event loop.

    A handler that raises does so in that loop, which reports it as that of any callback; others get what is theirs. Where a
    loop has been closed nobody listens: such requests are cancelled.

    Args:
        cancel: takes the id of a request that nobody wants any more.
    """

    def __init__(self, cancel: Callable[[str], None]) -> None:
        super().__init__()
        self._cancel = cancel

    def deliver(self, output: Any) -> None:
        """Bring one output to its handler, or into the queue."""
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Bring outputs to their handlers, or into the queue; each event loop is woken up once."""
        by_loop: dict[asyncio.AbstractEventLoop, Calls] = {}
        with self._lock:
            for output in outputs:
                entry = self.result_handlers.get(output.request_id)
                if entry is None:
                    self.output_queue.put(output)
                else:
                    by_loop.setdefault(entry[1], []).append((entry[0], output))
        for loop, calls in by_loop.items():
            try:
                loop.call_soon_threadsafe(_call, loop, calls)
            except RuntimeError:
                if not loop.is_closed():
                    raise
                self._forget(calls)

    def _forget(self, calls: Calls) -> None:
        with self._lock:
            for _, output in calls:
                self.result_handlers.pop(output.request_id, None)
        for _, output in calls:
            if not output.is_finished():
                self._cancel(output.request_id)

    def once(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        """`callback`, after whose last output its handler is gone, even if it raises."""

        def called(output: Any) -> None:
            try:
                callback(output)
            finally:
                if output.is_finished():
                    with self._lock:
                        self.result_handlers.pop(output.request_id, None)

        return called


def _call(loop: asyncio.AbstractEventLoop, calls: Sequence[tuple[Callable[[Any], None], Any]]) -> None:
    """Each by itself, so that an error ends none but its own."""
    for callback, output in calls:
        loop.call_soon(callback, output)
