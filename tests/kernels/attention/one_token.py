"""A case for kernels that normalise, rotate, append and attend to one new token of a row, against these steps in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from hf_fastattn.kernels.attention import rope_reference
from hf_fastattn.kernels.attention.workspace import Workspace
from tests.kernels.attention.test_append import steps
from tests.kernels.cases import assert_close, dense_attention, make_batch


def check(
    attend: Callable[..., torch.Tensor],
    *pasts: int,
    rotary: int | None = None,
    norm: bool = False,
    unit_offset: bool = False,
    window: int | None = None,
    written: bool = True,
    workspace: Workspace | None = None,
    processors: int = 132,
    device: str = "cpu",
    **shape,
) -> torch.Tensor:
    """Output of rows of `pasts` tokens, -1 of a row that takes no part, and a new one each; pages are looked at.

    Args:
        attend: gets the arguments of `short_row.short_row` up to `unit_offset`.
    """
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
        workspace.processors = processors
    got = attend(
        q, k, v, cos, sin, batch.k_pages, batch.v_pages, slots, batch.page_table, batch.seq_lens,
        scale=batch.scale, window=window, workspace=workspace, unit_offset=unit_offset, **weights,
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
