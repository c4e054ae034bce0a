"""A repeated launch hands the driver what a new one would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from hf_fastattn.kernels import relaunch
from hf_fastattn.kernels.attention.decode import decode_launch
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.relaunch import Launch
from tests.tools.fake_driver import FakeDriver, fake_driver
from tests.tools.targets import TARGETS


@triton.jit
def copy_kernel(x_ptr, out_ptr, none_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Programs and arguments of every launch."""
    seen: list[tuple[Any, ...]] = []
    make = FakeDriver.launcher_cls

    def recording(self: FakeDriver, source: Any, metadata: Any) -> Callable[..., None]:
        make(self, source, metadata)
        # Between the two: the stream, the kernel, its metadata and hooks.
        return lambda *given: seen.append((*given[:3], *given[9:]))

    monkeypatch.setattr(FakeDriver, "launcher_cls", recording)
    with fake_driver(TARGETS["sm_90"]):
        yield seen


def copy_launch() -> Launch:
    x, out = torch.zeros(64), torch.zeros(64)
    launch = Launch(copy_kernel, (2,), (x, out, None, 64), {"BLOCK": 64, "num_warps": 1})
    launch.first()
    return launch


def attention_launch(rows: int) -> Launch:
    q, pages = torch.zeros(rows, 8, 64, dtype=torch.bfloat16), torch.zeros(4, 16, 2, 64, dtype=torch.bfloat16)
    table, lengths = torch.zeros(rows, 4, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    options: dict[str, Any] = {"scale": 0.1, "window": None, "softcap": 5.0, "workspace": Workspace(q.device)}
    launch = decode_launch(q, pages, pages.clone(), table, lengths, **options)[2]
    assert launch is not None
    return launch


def same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b


@pytest.mark.parametrize("make", [copy_launch, lambda: attention_launch(1), lambda: attention_launch(3)])
def test_the_driver_sees_the_same(make: Callable[[], Launch], launched: list[tuple[Any, ...]]) -> None:
    launch = make()
    replaced = 2 if launch.kernel is copy_kernel else 4
    others = [tensor.clone() for tensor in launch.arguments[:replaced]]
    launch.again(*others)
    assert launch._call is not None
    # The first tensors need not live as long as the launch.
    assert launch.arguments[:replaced] == (None,) * replaced
    launch.kernel[launch.grid](*others, *launch.arguments[replaced:], **launch.options)
    first, again, anew = launched
    assert all(map(same, again, anew)) and len(again) == len(anew)
    assert sum(not same(x, y) for x, y in zip(first, again, strict=True)) == replaced


@pytest.mark.parametrize("why", ["another alignment", "an untested version", "nothing was compiled"])
def test_arguments_are_bound_anew(why: str, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    launch = copy_launch()
    if why == "an untested version":
        monkeypatch.setattr(relaunch, "TESTED", ("0.",))
    if why == "nothing was compiled":
        launch._compiled = None
    direct: list[Any] = []
    x = torch.zeros(65)[1:] if why == "another alignment" else torch.zeros(64)
    launch.again(*launch.arguments[:2])
    if launch._call is not None:
        monkeypatch.setattr(launch, "_call", lambda *given: direct.append(given))
    launch.again(x, torch.zeros(64))
    assert len(launched) == 3 and not direct and launched[-1][3] is x
    if why == "another alignment":
        launch.again(torch.zeros(64), torch.zeros(64))
        assert len(direct) == 1
