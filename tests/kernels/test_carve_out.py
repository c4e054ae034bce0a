"""Asking CUDA's driver for L1 cache: which kernels do, once each, and what happens without the driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_fastattn.kernels import carve_out, quick_launch


def test_without_the_driver_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carve_out, "_driver", lambda: None)
    carve_out.prefer_shared_memory(1, 50)


def test_what_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def answer(function: Any, *rest: int) -> int:
        asked.append((function.value, *rest))
        return 1

    monkeypatch.setattr(carve_out, "_driver", lambda: SimpleNamespace(cuFuncSetAttribute=answer))
    carve_out.prefer_shared_memory(1 << 40, 50)
    assert asked == [(1 << 40, carve_out.PREFERRED_CARVE_OUT, 50)]


def test_a_kernel_asks_before_its_first_launch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Compiled:
        function = 7

        @property
        def run(self) -> Any:
            done.append("loaded")
            return self

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_: done.append("launched again")

    class Kernel:
        params = [SimpleNamespace(name="x"), SimpleNamespace(name="K")]

        def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Compiled:
            done.append("compiled" if warmup else "launched")
            return Compiled()

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: self.run(*args, grid=grid, warmup=False, **options)

    def prefer(function: int, percent: int) -> None:
        assert (function, percent) == (7, 25)
        done.append("asked")

    monkeypatch.setattr(quick_launch, "JITFunction", Kernel)
    monkeypatch.setattr(quick_launch, "prefer_shared_memory", prefer)
    monkeypatch.setattr(quick_launch, "driver", SimpleNamespace(active=object()))
    monkeypatch.setattr(quick_launch._Known, "driver", None)
    monkeypatch.setattr(quick_launch._Known, "kernels", {})
    kernel, x = Kernel(), torch.zeros(4)
    for percent in (None, 25):
        done.clear()
        for _ in range(2):
            quick_launch.launch(kernel, (1,), (x,), {"K": 1 if percent else 2}, carve_out=percent)
        first = ["compiled", "loaded", "asked", "launched"] if percent else ["launched"]
        assert done == [*first, "launched again"]
