"""Norm, RoPE, append and attention of one new token in a launch, of a short row and by decode, against these in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.attention import test_new_token, test_short_row
from tests.tools.combinations import in_turn

BF16, FP16 = torch.bfloat16, torch.float16
pytestmark = pytest.mark.interpreter


@pytest.fixture(params=[test_short_row.check, test_new_token.check], ids=["short row", "decode"])
def check(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """The launch under test."""
    found: Callable[..., Any] = request.param
    return found


@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_turn([(1, 64, 16), (2, 128, 16), (4, 64, 32), (5, 80, 16), (8, 96, 64), (16, 256, 32)], [BF16, FP16]),
)
@pytest.mark.parametrize("norm", [False, True])
def test_shapes(check, shape, dtype, norm):
    """Also of a row that takes no part, and of one that has the new token alone."""
    ratio, dim, page = shape
    for past in (-1, 0, 15, 63, 64, 200):
        check(past, ratio=ratio, dim=dim, page=page, dtype=dtype, groups=2, norm=norm)


@pytest.mark.parametrize("window", [1, 16, 50, 1000])
def test_windows(check, window):
    for past in (0, 3, 64, 210):
        check(past, page=16, ratio=4, dim=32, window=window, dtype=BF16)


@pytest.mark.parametrize("options", [{"rotary": 16}, {"rotary": 0}, {"norm": True, "unit_offset": True, "rotary": 32}])
def test_rotations(check, options):
    check(77, page=16, ratio=2, dim=64, dtype=BF16, **options)


def test_a_row_without_a_slot_is_not_written(check):
    check(40, page=16, dim=32, dtype=BF16, written=False)
