"""Several short rows, and the parts of one; what all kernels of one token do is in `test_one_token.py`."""

from __future__ import annotations

import functools

import pytest
import torch

from hf_fastattn.kernels.attention.configs import ShortRowTile
from hf_fastattn.kernels.attention.short_row import short_row
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.attention import one_token

BF16, FP16 = torch.bfloat16, torch.float16
TILE = ShortRowTile(64, 2)


def check(*pasts: int, tile: ShortRowTile = TILE, **options) -> torch.Tensor:
    return one_token.check(functools.partial(short_row, tile=tile), *pasts, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize(("ratio", "window"), [(1, None), (4, None), (2, 30)])
def test_several_rows(ratio, window):
    """Also rows that take no part, and those of a new token alone."""
    check(40, -1, 0, 97, page=16, ratio=ratio, dim=64, dtype=BF16, norm=ratio == 4, window=window)
    check(16, 15, page=4, ratio=ratio, dim=32, dtype=FP16, groups=1, window=window, tile=ShortRowTile(16, 1))


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
