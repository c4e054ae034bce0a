"""`Watch`: sees to it that a call in which several processes compute together ends everywhere when one of them fails.

A sum over ranks waits for ever for a rank that does not come, and when a graph launches it no timeout of PyTorch's sees it.
So a thread beside the call writes a beat to the store of the process group, and looks for those of the other ranks.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

logger = logging.getLogger("hf_fastattn")

# Seconds between two beats.
POLL = 0.5
# Seconds without a beat of a rank after which it counts as failed: compiling a kernel may keep Python busy for some.
SILENT = 30.0
# Seconds that a rank may come to a call after the others, which one that is still at other work does: PyTorch's own timeout.
LATE = 600.0
# Seconds that a call goes on after another rank's has failed: ranks that were given the same bad argument end by themselves.
GRACE = 5.0
# Seconds that a step may take.
LONGEST_STEP = 120.0

FAILED, DONE = "failed: ", "done"


class RankFailedError(RuntimeError):
    """Another process that computes this model has failed, or does not answer; its communicators cannot be used any more."""


class Watch:
    """One call; a context around it.

    Args:
        store: of the process group, for this call alone.
        rank: of this process in the group, of `count`.
        abort: makes collectives that wait return.

    Attributes:
        failure: why the call was given up here; None as long as it was not.
    """

    def __init__(self, store: Any, rank: int, count: int, abort: Callable[[], None]) -> None:
        self.failure: str | None = None
        # When the call began to wait for a step.
        self._waits_since: float | None = None
        self._store, self._rank, self._abort = store, rank, abort
        self._others = [other for other in range(count) if other != rank]
        self._ended = threading.Event()
        self._state: str | None = None
        self._thread = threading.Thread(target=self._run, name="hf_fastattn ranks", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._state = f"{FAILED}{type(error).__name__}: {error}"
        self._ended.set()
        self._thread.join(GRACE)
        self.check(error)

    def check(self, cause: BaseException | None = None) -> None:
        """Raise a `RankFailedError` if the call was given up."""
        if self.failure is not None and not isinstance(cause, RankFailedError):
            raise RankFailedError(self.failure) from cause

    def begin_to_wait(self) -> None:
        """The call waits for a step."""
        self._waits_since = time.monotonic()

    def end_waiting(self) -> None:
        """The step has ended.

        Raises:
            RankFailedError: or it was given up.
        """
        self._waits_since = None
        self.check()

    def _run(self) -> None:
        beat, began = 0, time.monotonic()
        heard: dict[int, tuple[str | None, float]] = {other: (None, began) for other in self._others}
        while not self._ended.wait(POLL):
            beat += 1
            try:
                self._store.set(str(self._rank), str(beat))
                trouble = self._trouble(heard)
            except Exception as error:
                trouble = f"the store of the process group does not answer, so the process that holds it has ended ({error})"
            if trouble is not None:
                self._give_up(trouble)
                break
        # Of a short call nobody has seen a beat.
        failed = None if self.failure is None else f"{FAILED}{RankFailedError.__name__}: {self.failure}"
        state = self._state or failed or (DONE if beat else None)
        if state is not None:
            try:
                self._store.set(str(self._rank), state)
            except Exception as error:
                logger.info("hf_fastattn could not tell the other ranks how a call ended: %s", error)

    def _trouble(self, heard: dict[int, tuple[str | None, float]]) -> str | None:
        """Which rank has failed, and how; None if all are at work."""
        now = time.monotonic()
        for other in self._others:
            before, since = heard[other]
            state = self._store.get(str(other)).decode() if self._store.check([str(other)]) else None
            if state is not None and state.startswith(FAILED):
                return f"rank {other} has failed with {state.removeprefix(FAILED)}"
            if state != before or state == DONE:
                heard[other] = state, now
            elif state is None and now - since > LATE:
                return f"rank {other} has not come to the call for {LATE:.0f} s"
            elif state is not None and now - since > SILENT:
                return f"rank {other} was not heard of for {SILENT:.0f} s: its process was ended or stopped"
        waits = self._waits_since
        if waits is not None and now - waits > LONGEST_STEP:
            return f"a step has not ended for {LONGEST_STEP:.0f} s: the ranks may compute different things"
        return None

    def _give_up(self, trouble: str) -> None:
        if self._ended.wait(GRACE):
            return
        self.failure = f"{trouble}; a call over several ranks cannot go on without it"
        try:
            self._abort()
        except Exception as error:
            logger.warning("hf_fastattn could not abort the process group: %s", error)
        if not self._ended.wait(GRACE):
            # The call waits in PyTorch for what will never come, and no exception reaches it there.
            sys.stderr.write(f"hf_fastattn ends this process, rank {self._rank}: {self.failure}\n")
            sys.stderr.flush()
            os._exit(1)
