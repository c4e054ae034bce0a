"""A launch that skips Triton's binder hands the driver what one through it would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_fastattn.kernels import quick_launch
from hf_fastattn.kernels.layer.norm import add_rms_norm
from hf_fastattn.kernels.quick_launch import launch
from tests.kernels.test_relaunch import copy_kernel, launched, same
from tests.tools.fake_driver import fake_driver
from tests.tools.targets import TARGETS

__all__ = ["launched"]
OPTIONS = {"BLOCK": 64, "num_warps": 1}


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    quick_launch._Known.kernels.clear()


def known() -> int:
    return len(quick_launch._Known.kernels)


def test_the_driver_sees_the_same(launched: list[tuple[Any, ...]]) -> None:
    arguments = (torch.zeros(64), torch.zeros(64), None, 64)
    for _ in range(2):
        launch(copy_kernel, (2,), arguments, OPTIONS)
    assert known() == 1
    copy_kernel[(2,)](*arguments, **OPTIONS)
    first, again, bound = launched
    assert len(first) == len(again) == len(bound) and all(map(same, again, bound)) and all(map(same, first, bound))


@pytest.mark.parametrize("other", ["dtype", "alignment", "number", "constant", "None"])
def test_what_is_compiled_anew(other: str, launched: list[tuple[Any, ...]]) -> None:
    out = torch.zeros(64)
    launch(copy_kernel, (2,), (torch.zeros(64), out, None, 64), OPTIONS)
    x = {"dtype": torch.zeros(64, dtype=torch.float16), "alignment": torch.zeros(65)[1:]}.get(other, torch.zeros(64))
    given = x, out, out if other == "None" else None, 63 if other == "number" else 64
    options = {**OPTIONS, "BLOCK": 128} if other == "constant" else OPTIONS
    launch(copy_kernel, (2,), given, options)
    assert known() == 2
    copy_kernel[(2,)](*given, **options)
    assert all(map(same, launched[1], launched[2]))


def test_numbers_that_triton_does_not_look_at(launched: list[tuple[Any, ...]]) -> None:
    """The eps of a norm is no reason to look for another kernel, and reaches it."""
    x, weight = torch.zeros(2, 64), torch.ones(64)
    for eps in (1e-5, 1e-6):
        add_rms_norm(x, x, weight, eps)
    assert known() == 1 and [[value for value in one if isinstance(value, float)] for one in launched] == [[1e-5], [1e-6]]


def test_another_driver_and_too_many(launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.zeros(64), torch.zeros(64), None, 64)
    launch(copy_kernel, (2,), arguments, OPTIONS)
    before = quick_launch._Known.kernels
    with fake_driver(TARGETS["sm_80"]):
        launch(copy_kernel, (2,), arguments, OPTIONS)
        assert quick_launch._Known.kernels is not before and known() == 1
        monkeypatch.setattr(quick_launch, "MOST_KNOWN", 1)
        for number in range(48, 64):
            launch(copy_kernel, (2,), (*arguments[:3], number), OPTIONS)
        assert known() <= 2


def test_untested_versions_bind(launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_launch, "TESTED", ("0.",))
    for _ in range(2):
        launch(copy_kernel, (2,), (torch.zeros(64), torch.zeros(64), None, 64), OPTIONS)
    assert known() == 0 and len(launched) == 2
