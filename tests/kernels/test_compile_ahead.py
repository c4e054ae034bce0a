"""Launches that only compile: nothing is launched, everything is compiled, and afterwards all is as if they had not been."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import JITFunction, _async_compile

from hf_fastattn.kernels import quick_launch
from hf_fastattn.kernels.compile_ahead import compile_ahead, only_compiling
from hf_fastattn.kernels.layer.norm import add_rms_norm
from hf_fastattn.kernels.relaunch import Launch
from tests.kernels.test_relaunch import copy_kernel, launched

__all__ = ["launched"]


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), nowhere)  # noqa: F821


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    quick_launch._Known.kernels.clear()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that compiled, one entry a kernel."""
    found: list[str] = []
    compiled = triton.compiler.compile

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(threading.current_thread().name)
        return compiled(*args, **kwargs)

    monkeypatch.setattr(triton.compiler, "compile", noted)
    for function in (copy_kernel, wrong_kernel):
        function.device_caches.clear()
    return found


def copies(block: int) -> None:
    copy_kernel[(2,)](torch.zeros(64), torch.zeros(64), None, 64, BLOCK=block, num_warps=1)


def test_all_at_once_and_no_launch(launched: list[tuple[Any, ...]], compilations: list[str]) -> None:
    seen: list[bool] = []

    def run() -> None:
        seen.append(only_compiling())
        for block in (16, 32, 64):
            copies(block)

    run_of = JITFunction.run
    compile_ahead(run)
    assert seen == [True] and not only_compiling() and JITFunction.run is run_of and not launched
    assert len(compilations) == 3 and threading.main_thread().name not in compilations
    run()
    assert len(launched) == len(compilations) == 3


def test_launches_that_skip_the_binder(launched: list[tuple[Any, ...]], compilations: list[str]) -> None:
    """What they remember is never something that is still being compiled."""
    x, weight = torch.zeros(2, 64), torch.ones(64)
    known = [
        Launch(copy_kernel, (2,), (torch.zeros(64), torch.zeros(64), None, 64), {"BLOCK": 64, "num_warps": 1})
        for _ in range(2)
    ]

    def run() -> None:
        add_rms_norm(x, x, weight, 1e-5)
        for launch in known[:1]:
            launch.first()
            launch.again(torch.zeros(64), torch.zeros(64))

    compile_ahead(run)
    assert not launched and not quick_launch._Known.kernels
    # One that was first seen so goes on by way of the binder.
    known[0].again(torch.zeros(64), torch.zeros(64))
    del known[0]
    run()
    assert len(launched) == 4
    compile_ahead(lambda: (add_rms_norm(x, x, weight, 1e-5), known[0].again(torch.zeros(64), torch.zeros(64))))
    assert len(launched) == 4


def test_other_threads_launch(launched: list[tuple[Any, ...]], compilations: list[str]) -> None:
    def run() -> None:
        other = threading.Thread(target=lambda: (copies(16), compile_ahead(lambda: copies(32))))
        other.start()
        other.join()

    compile_ahead(run)
    # The other one launched, and did not wait to compile ahead.
    assert len(launched) == 1 and len(compilations) == 1


def test_a_kernel_that_does_not_compile(launched: list[tuple[Any, ...]], compilations: list[str]) -> None:
    with pytest.raises(Exception, match="nowhere"):
        compile_ahead(lambda: wrong_kernel[(1,)](torch.zeros(64), BLOCK=64))
    with pytest.raises(ZeroDivisionError):
        compile_ahead(lambda: 1 / 0)
    assert _async_compile.active_mode.get() is None and not only_compiling()
    copies(16)
    assert len(launched) == 1
