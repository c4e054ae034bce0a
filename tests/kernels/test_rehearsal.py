"""A rehearsal compiles what launches inside of it need, and makes none."""

from __future__ import annotations

import functools
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import driver

import hf_fastattn
from hf_fastattn.kernels import rehearsal as rehearsal_module
from hf_fastattn.kernels.attention.append import rope_append
from hf_fastattn.kernels.layer.matvec import matvec
from hf_fastattn.kernels.quick_launch import launch
from hf_fastattn.kernels.rehearsal import can_rehearse, prepared, rehearsal
from hf_fastattn.kernels.relaunch import Launch
from tests.kernels.test_relaunch import copy_kernel, launched

__all__ = ["launched"]
OPTIONS = {"BLOCK": 64, "num_warps": 1}
# A kernel that is launched without `prepared`, which alone knows of rehearsals.
UNPREPARED = re.compile(r"(?<!prepared\()\b\w*kernel\)?\[\(")


def run_all() -> None:
    """Every way by which kernels are launched."""
    arguments = (torch.zeros(64), torch.zeros(64), None, 64)
    launch(copy_kernel, (2,), arguments, OPTIONS)
    prepared(copy_kernel)[(2,)](*arguments, **OPTIONS)
    one = Launch(copy_kernel, (2,), arguments, OPTIONS)
    one.first()
    one.again(torch.zeros(64), torch.zeros(64))
    x = torch.zeros(1, 64)
    matvec(x, [torch.zeros(32, 64)])
    pages, table = torch.zeros(2, 16, 1, 64), torch.zeros(1, 64)
    heads = torch.zeros(1, 1, 64)
    rope_append(heads, heads, heads, table, table, pages, pages, torch.zeros(1, dtype=torch.int64))


def test_nothing_is_launched_and_all_is_compiled(launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_rehearse()
    with rehearsal():
        assert not can_rehearse()
        run_all()
    assert launched == [] and can_rehearse()
    # Launchers too: the driver was asked for each.
    active = driver.active
    assert {function.__name__ for function in active.launched} >= {"copy_kernel", "matvec_kernel", "rope_append_kernel"}
    # Whatever would be compiled now was forgotten in the rehearsal.
    monkeypatch.setattr(type(copy_kernel), "_do_compile", None)
    run_all()
    assert len(launched) == 6


def test_an_error_ends_it(launched: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ZeroDivisionError), rehearsal():
        launch(copy_kernel, (2,), (torch.zeros(64), torch.zeros(64), None, 1 // 0), OPTIONS)
    assert can_rehearse()
    launch(copy_kernel, (2,), (torch.zeros(64), torch.zeros(64), None, 64), OPTIONS)
    assert len(launched) == 1


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 1)
    tl.store(x_ptr, 0.0)


def test_a_kernel_that_does_not_compile_ends_it(launched: list[tuple[Any, ...]]) -> None:
    """Triton 3.6 would hand every later launch to threads that are gone."""
    with pytest.raises(triton.CompilationError), rehearsal():
        launch(wrong_kernel, (1,), (torch.zeros(64),), OPTIONS)
    assert can_rehearse()
    launch(copy_kernel, (2,), (torch.zeros(64), torch.zeros(64), None, 64), OPTIONS)
    assert len(launched) == 1


def test_every_launcher_knows_of_rehearsals() -> None:
    folder = Path(hf_fastattn.__file__).parent / "kernels"
    files = [path for path in folder.rglob("*.py") if path.name != "quick_launch.py"]
    found = {path.name: UNPREPARED.findall(path.read_text()) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("kinds", "boxes"), [(["*fp32", "i32"], 0), (["tensordesc<bf16[16,64]>", "tensordesc<bf16[1]>"], 2)]
)
def test_a_launcher_is_guessed_from_the_source(kinds: list[str], boxes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, int]] = []

    def make(source: Any, metadata: Any) -> None:
        given.append((source, len(metadata.tensordesc_meta)))
        # What is not known yet.
        assert metadata.launch_pdl

    monkeypatch.setattr(rehearsal_module, "driver", SimpleNamespace(active=SimpleNamespace(launcher_cls=make)))
    src = SimpleNamespace(signature=dict(enumerate(kinds)))
    rehearsal_module._guess_launcher(lambda: src)
    assert given == [(src, boxes)]
    # One that holds nothing, as in another version: none is made, and the kernel compiles.
    kernel = SimpleNamespace(src=None, metadata=None)
    monkeypatch.setattr(rehearsal_module.driver.active, "launcher_cls", lambda *those: given.append(those))
    rehearsal_module._beside_launcher(functools.partial(lambda made: made, kernel))
    assert given[1:] == [(None, None)]


def test_a_launcher_is_made_beside_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, order, src = threading.Event(), list[str](), SimpleNamespace(signature={0: "*fp32"})

    def make(source: Any, metadata: Any) -> None:
        assert source is src
        order.append("launcher")
        begun.set()

    def compile_kernel() -> Any:
        assert begun.wait(30), "the launcher is not made before the kernel is there"
        order.append("kernel")
        return SimpleNamespace(src=src, metadata=SimpleNamespace())

    monkeypatch.setattr(rehearsal_module, "driver", SimpleNamespace(active=SimpleNamespace(launcher_cls=make)))
    rehearsal_module._beside_launcher(compile_kernel)
    assert order == ["launcher", "kernel", "launcher"]
