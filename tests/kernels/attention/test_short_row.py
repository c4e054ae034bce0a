"""Norm, RoPE, append and attention of a token of each of a few short rows in one kernel, against these steps in PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hf_fastattn.kernels.attention import rope_reference
from hf_fastattn.kernels.attention.configs import ShortRowTile
from hf_fastattn.kernels.attention.short_row import short_row
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.attention.test_append import steps
from tests.kernels.cases import assert_close, dense_attention, make_batch
from tests.tools.combinations import in_turn

BF16, FP16 = torch.bfloat16, torch.float16
PROCESSORS = 132
TILE = ShortRowTile(64, 2)


def check(
    *pasts: int,
    rotary: int | None = None,
    norm: bool = False,
    unit_offset: bool = False,
    window: int | None = None,
    written: bool = True,
    workspace: Workspace | None = None,
    device: str = "cpu",
    tile: ShortRowTile = TILE,
    **shape,
) -> torch.Tensor:
    """Output, and the pages after the append, of rows of `pasts` tokens and a new one each."""
    rows = len(pasts)
    batch = make_batch([1] * rows, pasts, scattered=True, window=window, device=device, **shape)
    dtype, olds = batch.q.dtype, batch.rows
    groups, dim = batch.k_pages.shape[2:]
    page = batch.k_pages.shape[1]
    generator = torch.Generator(device).manual_seed(sum(pasts))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    # Slices of one projection, as in a layer.
    heads = batch.q.shape[1]
    q, k, v = normal(rows, heads + 2 * groups, dim).split((heads, groups, groups), 1)
    angles = normal(rows, (dim if rotary is None else rotary) // 2).repeat(1, 2)
    cos, sin = angles.cos(), rope_reference.signed_sin(angles.sin())
    weights = {"q_norm": normal(dim), "k_norm": normal(dim), "eps": 1e-5} if norm else {}
    slots = torch.full((rows,), -1, dtype=torch.int32, device=device)
    places = {}
    for row, past in enumerate(pasts):
        if past >= 0:
            place = places[row] = batch.table[row][past // page], past % page
            batch.k_pages[place] = batch.v_pages[place] = math.nan
            if written:
                slots[row] = place[0] * page + place[1]
    before = batch.k_pages.clone(), batch.v_pages.clone()
    workspace = workspace or Workspace(torch.device(device))
    if device == "cpu":
        workspace.processors = PROCESSORS
    got = short_row(
        q, k, v, cos, sin, batch.k_pages, batch.v_pages, slots, batch.page_table, batch.seq_lens,
        scale=batch.scale, window=window, workspace=workspace, unit_offset=unit_offset, tile=tile, **weights,
    )  # fmt: skip
    outs, keys = [], []
    for target in (dtype, torch.float64):
        turned, key = steps(q, k, cos, sin, weights, unit_offset, target)
        news = key, v.to(target)
        pairs = [
            tuple(torch.cat((old[:-1].to(target), new[row : row + 1])) for old, new in zip(pair, news, strict=True))
            if row in places else pair for row, pair in enumerate(olds)
        ]  # fmt: skip
        outs.append(dense_attention(replace(batch, q=turned, rows=pairs), target, window=window)[0])
        keys.append(key)
    assert_close("output", got, *outs)
    for row, place in places.items() if written else ():
        assert torch.equal(batch.v_pages[place], v[row])
        assert_close("key", batch.k_pages[place][None], *(key[row][None] for key in keys))
    for pages, old in zip((batch.k_pages, batch.v_pages), before, strict=True):
        # A write to slot -1 shows in the page before the first.
        assert pages._base is not None and pages._base[0].isnan().all()
        for place in places.values() if written else ():
            pages[place] = old[place]
        assert torch.equal(pages.nan_to_num(7.0), old.nan_to_num(7.0))
    assert not workspace.split_kv(1, 1, dim)[2].any()
    return got


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
def test_parts(processors, monkeypatch):
    """Few programs take several tiles each, many one: each time twice, since counters have to be zero again."""
    monkeypatch.setattr(f"{__name__}.PROCESSORS", processors)
    workspace = Workspace(torch.device("cpu"))
    for past in (15, 16, 17, 33, 100):
        shape = {"page": 4, "ratio": 2, "groups": 1, "dim": 32, "dtype": BF16, "tile": ShortRowTile(16, 1)}
        first = check(past, workspace=workspace, **shape)
        assert torch.equal(first, check(past, workspace=workspace, **shape))
