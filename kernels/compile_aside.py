"""`Aside`: a kernel compiled in a process of its own, which leaves it on disk for the one that launches it.

Triton reads a kernel's source, and LLVM's passes run their Python parts, under Python's lock: of a first call's two dozen
kernels threads compile few at once. A forked process has all modules loaded, so that it begins at once, and a lock of its
own. It touches no device, and ends without any clean-up of what it has inherited.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime.cache import get_cache_manager

logger = logging.getLogger("hf_fastattn")

# A process of much memory takes long to fork, and holds Python's lock meanwhile.
SLOW_FORK = 0.2
# Seconds after which a process is given up. One that waits for a lock which a thread held when it was forked does nothing:
# without any time of a processor, and without an assembler or a C compiler that it waits for, it is given up much earlier.
MOST_SECONDS, MOST_IDLE_SECONDS = 120, 5
# Without the numbers of source lines, which profilers show, the largest kernels compile in three quarters of the time.
LINES = "TRITON_DISABLE_LINE_INFO"
# Tokenizers' library warns on the terminal of every fork after it has used threads, where this variable is not set.
TOKENIZERS = "TOKENIZERS_PARALLELISM"
# Held by the thread that has the kernel of this key compiled.
_turns: dict[str, threading.Lock] = {}


class Aside:
    """Processes that compile, as long as all goes well: the first that fails, or is slow to fork, is the last.

    Attributes:
        works: whether another one would be tried.
    """

    def __init__(self) -> None:
        self.works = can_fork()
        self._forking = threading.Lock()

    def compile(self, key: str, run: Callable[[], Any]) -> None:
        """Have `run` called in another process, if what it compiles is not on disk; returns when it has ended.

        Args:
            key: Triton's, of the kernel.
        """
        if not self.works or _is_kept(key):
            return
        # Another thread may have it compiled just now.
        with _turns.setdefault(key, threading.Lock()):
            if not _is_kept(key):
                self._compile(run)

    def _compile(self, run: Callable[[], Any]) -> None:
        try:
            with self._forking:
                began = time.perf_counter()
                process = _fork(run) if self.works else None
                self.works &= time.perf_counter() - began < SLOW_FORK
            if process is not None and not _ends_well(process):
                self.works = False
        except OSError as error:
            self.works = False
            logger.info("hf_fastattn compiles in threads alone: %s", error)


def can_fork() -> bool:
    """Whether a process can be forked, and waited for, without harm to what else runs."""
    # Networks may have pages registered that must not be copied.
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    return alone and hasattr(os, "fork") and hasattr(os, "pidfd_open") and not knobs.compilation.always_compile


def _is_kept(key: str) -> bool:
    """Whether Triton finds the kernel on disk; also if kernels are kept in a way that is not known."""
    folder = getattr(get_cache_manager(hashlib.sha256(key.encode()).hexdigest()), "cache_dir", None)
    return folder is None or any(Path(folder).glob("__grp__*.json"))


def _fork(run: Callable[[], Any]) -> int:
    """The id of a process that calls `run` and ends, with status 0 if nothing was raised."""
    with _quiet_tokenizers():
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        # What is collected may be a tensor's memory on a device that this process must not call.
        gc.disable()
        os.environ.setdefault(LINES, "1")
        run()
        status = 0
    finally:
        os._exit(status)


@contextlib.contextmanager
def _quiet_tokenizers() -> Iterator[None]:
    sets = "tokenizers" in sys.modules and TOKENIZERS not in os.environ
    if sets:
        # What it does without the variable.
        os.environ[TOKENIZERS] = "true"
    try:
        yield
    finally:
        if sets:
            os.environ.pop(TOKENIZERS, None)


def _comes(poll: select.poll, process: int) -> bool:
    """Whether the end of a process is polled in time."""
    began = moved = time.monotonic()
    seen: list[bytes] | None = None
    while not poll.poll(1000 * min(MOST_SECONDS, MOST_IDLE_SECONDS) // 5):
        now, done = time.monotonic(), _done(process)
        if done is None or done != seen:
            seen, moved = done, now
        if now - began > MOST_SECONDS:
            return False
        if now - moved > MOST_IDLE_SECONDS:
            logger.info("hf_fastattn gives up a process that compiles, and has done nothing for %s s", MOST_IDLE_SECONDS)
            return False
    return True


def _done(process: int) -> list[bytes] | None:
    """The processor's time that a sleeping process has had; None if it is under way, or waits for one of its own."""
    own = _status(process)
    if not own or own[0] != b"S":
        return None
    parents = (_status(int(other))[1:2] for other in os.listdir("/proc") if other.isdecimal())
    return None if [b"%d" % process] in parents else own[11:]


def _status(process: int) -> list[bytes]:
    """State, parent, and so on, up to the time in code of its own and in the system's, of all threads; empty if unknown."""
    try:
        text = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return []
    # What is in brackets, a name, may hold anything.
    return text.rpartition(b")")[2].split()[:13]


def _ends_well(process: int) -> bool:
    """Waits for a process, which is ended if it takes too long or waiting is interrupted."""
    ended = False
    try:
        watched = os.pidfd_open(process)
        try:
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            ended = _comes(poll, process)
        finally:
            os.close(watched)
    finally:
        if not ended:
            os.kill(process, signal.SIGKILL)
        try:
            _, status = os.waitpid(process, 0)
        except ChildProcessError:
            # Where signals of children are ignored, nobody has to wait, and nobody learns how one ended.
            status = 0
    return ended and status == 0
