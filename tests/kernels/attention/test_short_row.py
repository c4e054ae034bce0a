"""Norm, RoPE, append and attention of a token of each of a few short rows in one kernel, against these steps in PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch

from hf_fastattn.kernels.attention.configs import ShortRowTile
from hf_fastattn.kernels.attention.short_row import short_row
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.attention import one_token
from tests.tools.combinations import in_turn

BF16, FP16 = torch.bfloat16, torch.float16
TILE = ShortRowTile(64, 2)


def check(*pasts: int, tile: ShortRowTile = TILE, **options) -> torch.Tensor:
    return one_token.check(functools.partial(short_row, tile=tile), *pasts, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"),
    in_turn([(1, 64, 16), (2, 128, 16), (4, 64, 32), (5, 80, 16), (8, 96, 64), (16, 256, 32)], [BF16, FP16]),
)
@pytest.mark.parametrize("norm", [False, True])
def test_shapes(shape, dtype, norm):
    ratio, dim, page = shape
    for past in (-1, 0, 15, 63, 200):
        check(past, ratio=ratio, dim=dim, page=page, dtype=dtype, groups=2, norm=norm)


@pytest.mark.interpreter
@pytest.mark.parametrize("window", [1, 16, 50, 1000])
def test_windows(window):
    for past in (0, 3, 64, 210):
        check(past, page=16, ratio=4, dim=32, window=window, dtype=BF16)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{"rotary": 16}, {"rotary": 0}, {"norm": True, "unit_offset": True, "rotary": 32}])
def test_rotations(options):
    check(77, page=16, ratio=2, dim=64, dtype=BF16, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize(("ratio", "window"), [(1, None), (4, None), (2, 30)])
def test_several_rows(ratio, window):
    """Also rows that take no part, and those of a new token alone."""
    check(40, -1, 0, 97, page=16, ratio=ratio, dim=64, dtype=BF16, norm=ratio == 4, window=window)
    check(16, 15, page=4, ratio=ratio, dim=32, dtype=FP16, groups=1, window=window, tile=ShortRowTile(16, 1))


@pytest.mark.interpreter
def test_a_row_without_a_slot_is_not_written():
    check(40, page=16, dim=32, dtype=BF16, written=False)


@pytest.mark.interpreter
@pytest.mark.parametrize("processors", [1, 6, 132])
def test_parts(processors):
    """Few programs take several tiles each, many one: each time twice, since counters have to be zero again."""
    workspace = Workspace(torch.device("cpu"))
    for past in (15, 16, 17, 33, 100):
        shape = {"page": 4, "ratio": 2, "groups": 1, "dim": 32, "dtype": BF16, "tile": ShortRowTile(16, 1)}
        shape |= {"processors": processors}
        first = check(past, workspace=workspace, **shape)
        assert torch.equal(first, check(past, workspace=workspace, **shape))
