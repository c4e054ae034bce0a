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
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

logger = logging.getLogger("hf_fastattn")

# Seconds between two beats.
POLL = 0.5
# Seconds without a beat of a rank after which it counts as failed: compiling a kernel may keep Python busy for some.
SILENT = 30.0
# Seconds that a rank may come to a call after the others, which one that is still at other work does: PyTorch's own timeout.
LATE = 600.0
# Seconds that a call goes on after another rank's has failed: ranks that were given the same bad argument end by themselves.
GRACE = 5.0
# Seconds that a step may take, once all ranks are in the call.
LONGEST_STEP = 120.0
# Seconds between two looks of a call at the store, at first and at most.
FIRST_LOOK, LAST_LOOK = 0.0005, 0.05

# States of a rank: a number, which is its beat, that it has failed after so many forwards, and how, or:
FAILED, DONE = "failed after ", "done"
# Before the number of a rank: the name of what it has generated.
RESULT = "result "
NO_STORE = "the store of the process group does not answer, so the process that holds it has ended"


def how_ended(store: Any, rank: int) -> tuple[int | None, str]:
    """How a call ended on a rank, once it has: after how many forwards it failed, None if it did not; and with what.

    Raises:
        RankFailedError: nothing is heard of the rank.
    """
    state, since = None, time.monotonic()
    while True:
        now = time.monotonic()
        found = store.get(str(rank)).decode() if store.check([str(rank)]) else None
        if found == DONE:
            return None, ""
        if found is not None and found.startswith(FAILED):
            begun, error = found.removeprefix(FAILED).split(": ", 1)
            return int(begun), error
        if found != state:
            state, since = found, now
        if now - since > (LATE if found is None else SILENT):
            raise RankFailedError(f"rank {rank} was not heard of after a call that failed")
        time.sleep(LAST_LOOK)


class Pending(Protocol):
    """A CUDA event."""

    def query(self) -> bool: ...


class RankFailedError(RuntimeError):
    """Another process that computes this model has failed, or does not answer; its communicators cannot be used any more."""


def wait_for(store: Any, names: Sequence[str], seconds: float, check: Callable[[], None]) -> bool:
    """Wait until the store has all these names; whether they came in so many seconds.

    Args:
        check: asked again and again, raises where there is nothing to wait for any more.
    """
    pause, until = FIRST_LOOK, time.monotonic() + seconds
    while not store.check(list(names)):
        check()
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LAST_LOOK)
    return True


class Watch:
    """One call; a context around it.

    Args:
        store: of the process group, for this call alone.
        rank: of this process in the group, of `count`.
        abort: makes collectives that wait return.
        why_gone: why a rank that has not come will not, if it has said so.

    Attributes:
        failure: why the call was given up here; None as long as it was not.
        begun: forwards and steps that were begun here: ranks that failed after as many have met in the same sums.
    """

    def __init__(
        self, store: Any, rank: int, count: int, abort: Callable[[], None], why_gone: Callable[[], str | None] = lambda: None
    ) -> None:
        self.failure: str | None = None
        self.begun = 0
        # When the call began to wait for a step, and to compute a forward, which may be the device's work yet.
        self._waits_since: float | None = None
        self._computes: tuple[float, Pending | None] | None = None
        self._store, self._rank, self._abort, self._why_gone = store, rank, abort, why_gone
        self._others = [other for other in range(count) if other != rank]
        # When other ranks were first seen in the call, and at its end.
        self._came: dict[int, float] = {}
        self._left: dict[int, float] = {}
        self._ended = threading.Event()
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="hf_fastattn ranks", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self._error = f"{type(error).__name__}: {error}"
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

    def begin_forward(self) -> None:
        """A forward begins, which sums over ranks."""
        self.begun += 1
        self._computes = time.monotonic(), None

    def end_forward(self, pending: Pending | None) -> None:
        """Its launches are made; `pending`: says when the device has done them."""
        computes = self._computes
        self._computes = None if pending is None or computes is None else (computes[0], pending)

    def compare(self, result: int) -> None:
        """See that every rank has the same result, once all have ended.

        Raises:
            RankFailedError: another rank failed meanwhile.
            ValueError: the results differ.
        """
        names = [f"{RESULT}{other}" for other in self._others]
        try:
            self._store.set(f"{RESULT}{self._rank}", str(result))
            wait_for(self._store, names, LATE, self.check)
            results = [int(self._store.get(name)) for name in names]
        except RankFailedError:
            raise
        except Exception as error:
            raise RankFailedError(f"{NO_STORE} ({error})") from error
        for other, found in zip(self._others, results, strict=True):
            if found != result:
                raise ValueError(
                    f"rank {other} has generated other tokens than this one: processors, stopping criteria and random "
                    "numbers have to be the same on every rank that computes the model"
                )

    def _run(self) -> None:
        beat, began = 0, time.monotonic()
        heard: dict[int, tuple[str | None, float]] = {other: (None, began) for other in self._others}
        while not self._ended.wait(POLL):
            beat += 1
            try:
                self._store.set(str(self._rank), str(beat))
                trouble = self._trouble(heard)
            except Exception as error:
                trouble = f"{NO_STORE} ({error})"
            if trouble is not None:
                self._give_up(trouble)
                break
        self._say_how_it_ended()

    def _say_how_it_ended(self) -> None:
        error = self._error if self.failure is None else f"{RankFailedError.__name__}: {self.failure}"
        try:
            self._store.set(str(self._rank), DONE if error is None else f"{FAILED}{self.begun}: {error}")
        except Exception as failure:
            logger.info("hf_fastattn could not tell the other ranks how a call ended: %s", failure)

    def _trouble(self, heard: dict[int, tuple[str | None, float]]) -> str | None:
        """Which rank has failed, and how; None if all are at work."""
        now = time.monotonic()
        for other in self._others:
            before, since = heard[other]
            state = self._store.get(str(other)).decode() if self._store.check([str(other)]) else None
            if state is not None:
                self._came.setdefault(other, now)
            if state is not None and state.startswith(FAILED):
                return f"rank {other} has failed with {state.split(': ', 1)[1]}"
            needed = self._is_needed_since()
            if needed is not None and (state == DONE or self._store.check([f"{RESULT}{other}"])):
                if now - max(needed, self._left.setdefault(other, now)) > SILENT:
                    return (
                        f"rank {other} has ended the call, and a step here waits for it: the ranks compute different things"
                    )
            if state != before or state == DONE:
                heard[other] = state, now
            elif state is None and (gone := self._why_gone()) is not None:
                return gone
            elif state is None and now - since > LATE:
                return f"rank {other} has not come to the call for {LATE:.0f} s"
            elif state is not None and now - since > SILENT:
                return f"rank {other} was not heard of for {SILENT:.0f} s: its process was ended or stopped"
        # A forward may take longer than a step.
        waits = self._waits_since
        if (
            waits is not None
            and len(self._came) == len(self._others)
            and now - max(waits, *self._came.values()) > LONGEST_STEP
        ):
            return f"a step has not ended for {LONGEST_STEP:.0f} s: the ranks may compute different things"
        return None

    def _is_needed_since(self) -> float | None:
        """When the call began with the step or forward that it waits for, whose sums need all ranks; None if it does not."""
        waits, computes = self._waits_since, self._computes
        if waits is None and computes is not None and (computes[1] is None or not computes[1].query()):
            return computes[0]
        return waits

    def _give_up(self, trouble: str) -> None:
        if self._ended.wait(GRACE):
            return
        self.failure = f"{trouble}; a call over several ranks cannot go on without it"
        # While the process that holds the store may still be there.
        self._say_how_it_ended()
        try:
            self._abort()
        except Exception as error:
            logger.warning("hf_fastattn could not abort the process group: %s", error)
        if not self._ended.wait(GRACE):
            # The call waits in PyTorch for what will never come, and no exception reaches it there.
            sys.stderr.write(f"hf_fastattn ends this process, rank {self._rank}: {self.failure}\n")
            sys.stderr.flush()
            os._exit(1)
