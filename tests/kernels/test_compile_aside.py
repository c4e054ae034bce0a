"""Kernels are compiled in processes of their own, found on disk afterwards, and by threads where that does not work."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs
from triton.runtime.cache import get_cache_manager

from hf_fastattn.kernels import compile_aside
from hf_fastattn.kernels import rehearsal as rehearsal_module
from hf_fastattn.kernels.compile_aside import Aside
from hf_fastattn.kernels.quick_launch import launch
from hf_fastattn.kernels.rehearsal import can_rehearse, compile_behind, noted, rehearsal
from tests.kernels.test_relaunch import copy_kernel, launched

__all__ = ["launched"]
OPTIONS = {"BLOCK": 64, "num_warps": 1}
pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="processes are watched by Linux' pidfd")


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1)
    tl.store(x_ptr, 0.0)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_aside, "SLOW_FORK", 60)


@pytest.fixture
def from_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """Of each kernel of this process, whether it came from disk, where nothing is at first."""
    found: list[bool] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **given: found.append(cache_hit))
    return found


def launch_some() -> None:
    for warps in (1, 2, 4):
        launch(copy_kernel, (2,), (torch.zeros(64), torch.zeros(64), None, 64), {"BLOCK": 64, "num_warps": warps})


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that were forked."""
    made: list[int] = []
    fork = compile_aside._fork

    def noted(run: Callable[[], Any]) -> int:
        made.append(fork(run))
        return made[-1]

    monkeypatch.setattr(compile_aside, "_fork", noted)
    return made


def assert_ended(processes: list[int]) -> None:
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_processes_compile_what_is_not_on_disk(launched: list[Any], from_disk: list[bool], forks: list[int]) -> None:
    with rehearsal():
        launch_some()
    assert from_disk == [True] * 3 and len(forks) == 3 and launched == []
    assert_ended(forks)
    copy_kernel.device_caches.clear()
    with rehearsal():
        launch_some()
    assert from_disk == [True] * 6 and len(forks) == 3


def test_what_was_noted_is_compiled_behind(launched: list[Any], from_disk: list[bool], forks: list[int]) -> None:
    """Nothing is launched or compiled where it is noted; whoever needs it afterwards finds it on disk."""
    notes = noted(launch_some)
    assert len(notes) == 3 and not launched and not forks and not from_disk and can_rehearse()
    copy_kernel.device_caches.clear()
    thread = compile_behind(torch.device("cpu"), notes)
    assert thread is not None and thread.daemon
    thread.join(120)
    assert not thread.is_alive() and len(forks) == 3 and not from_disk and not launched
    with rehearsal():
        launch_some()
    assert from_disk == [True] * 3 and len(forks) == 3
    launch_some()
    assert len(launched) == 3


def test_nobody_compiles_behind_without_processes(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process it would take the lock from whatever the user does meanwhile."""
    monkeypatch.setattr(rehearsal_module, "can_fork", lambda: False)
    assert compile_behind(torch.device("cpu"), noted(launch_some)) is None


def test_a_fault_behind_is_left_to_whoever_launches(launched: list[Any], from_disk: list[bool], forks: list[int]) -> None:
    thread = compile_behind(torch.device("cpu"), [lambda: 1 // 0, *noted(launch_some)])
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive() and not forks and can_rehearse()


def test_one_of_two_threads_compiles_a_kernel(tmp_path: Path, from_disk: list[bool], forks: list[int]) -> None:
    """The other waits until it is on disk."""
    folder = tmp_path / get_cache_manager(hashlib.sha256(b"key").hexdigest()).key
    begun, kept = threading.Event(), folder / "__grp__kernel.json"

    def run() -> None:
        time.sleep(1)
        folder.mkdir(exist_ok=True)
        kept.write_text("{}")

    def compile_it() -> None:
        begun.set()
        Aside().compile("key", run)
        assert kept.exists()

    threads = [threading.Thread(target=compile_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert begun.is_set() and len(forks) == 1


def test_threads_compile_where_nothing_is_forked(
    launched: list[Any], from_disk: list[bool], forks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_aside, "can_fork", lambda: False)
    with rehearsal():
        launch_some()
    assert from_disk == [False] * 3 and not forks and can_rehearse()


def test_a_slow_fork_is_the_last(
    launched: list[Any], from_disk: list[bool], forks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_aside, "SLOW_FORK", 0)
    with rehearsal():
        launch_some()
    assert sorted(from_disk) == [False, False, True] and len(forks) == 1


def test_what_does_not_compile_is_an_error_here(launched: list[Any], from_disk: list[bool], forks: list[int]) -> None:
    with pytest.raises(triton.CompilationError), rehearsal():
        launch(wrong_kernel, (1,), (torch.zeros(64),), OPTIONS)
    assert len(forks) == 1 and can_rehearse()
    assert_ended(forks)


@pytest.mark.parametrize("end", [lambda: 1 // 0, lambda: os.kill(os.getpid(), signal.SIGKILL), sys.exit])
def test_a_process_that_fails_is_the_last(end: Callable[[], Any], tmp_path: Path, forks: list[int]) -> None:
    aside = Aside()
    aside.compile("key", end)
    assert not aside.works and len(forks) == 1
    aside.compile("another", lambda: None)
    assert len(forks) == 1
    assert_ended(forks)


def test_a_process_that_hangs_is_ended(forks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_aside, "MOST_SECONDS", 0.1)
    aside, began = Aside(), time.monotonic()
    aside.compile("key", lambda: time.sleep(60))
    assert not aside.works and time.monotonic() - began < 30
    assert_ended(forks)


def test_a_process_that_does_nothing_is_ended_early(forks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_aside, "MOST_IDLE_SECONDS", 1)
    held = threading.Lock()
    held.acquire()
    aside, began = Aside(), time.monotonic()
    aside.compile("key", held.acquire)
    assert not aside.works and time.monotonic() - began < 30
    assert_ended(forks)


def works_for_two_seconds() -> None:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize("work", [works_for_two_seconds, lambda: subprocess.run(["sleep", "2"], check=True)])
def test_a_process_that_works_or_waits_for_its_own_is_not(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_aside, "MOST_IDLE_SECONDS", 1)
    aside = Aside()
    aside.compile("key", work)
    assert aside.works


def test_children_that_nobody_waits_for(forks: list[int]) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        aside = Aside()
        aside.compile("key", lambda: None)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert aside.works and len(forks) == 1


def test_nothing_is_forked_under_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Aside().works
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not Aside().works


def test_a_fork_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    aside = Aside()
    aside.compile("key", lambda: None)
    assert not aside.works


@pytest.mark.parametrize("given", [None, "false"])
def test_tokenizers_say_nothing_of_forks(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", sys)
    monkeypatch.delenv(compile_aside.TOKENIZERS, raising=False)
    if given is not None:
        monkeypatch.setenv(compile_aside.TOKENIZERS, given)
    with compile_aside._quiet_tokenizers():
        assert os.environ[compile_aside.TOKENIZERS] == (given or "true")
    assert os.environ.get(compile_aside.TOKENIZERS) == given
