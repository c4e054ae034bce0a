"""Parts of suffixes and prefixes merged where an empty state that is not quite empty would show: far below a score of 0.

A state that was to be empty, but had a maximum of 0, would take all weight from keys whose scores are large and negative.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_fastattn.kernels.attention import configs, shared_prefix
from hf_fastattn.kernels.attention.shared_prefix import paged_decode_shared
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.variants.compiled import compile_variant
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.attention.test_shared_prefix import Group, make_nested, make_shared
from tests.kernels.cases import Batch, assert_attention, make_batch
from tests.kernels.variants.test_reference import plan_of

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Rows with a prefix and nothing else, with neither, without a prefix, and with fewer parts than others have.
GROUPS: list[Group] = [(160, [20, 700, 0]), (0, [130, None]), (48, [0, 90]), (16, [None])]


def sink(batch: Batch, depth: float) -> None:
    """Make all scores of a batch about `-depth`; what no token holds stays NaN."""
    batch.q.abs_().add_(1.0)
    step = depth / (float(batch.q.float().mean()) * batch.q.shape[-1] * batch.scale)
    batch.k_pages.sub_(step)
    for keys, _ in batch.rows:
        keys.sub_(step)


def run(batch: Batch, starts: torch.Tensor, lens: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_decode_shared(
        batch.q, batch.k_pages, batch.v_pages, batch.page_table, batch.seq_lens, starts, lens,
        max_group_rows=3, scale=batch.scale, **options,
    )  # fmt: skip


@pytest.fixture(params=[1, 3, 8])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Programs of each suffix; of prefixes the tiles are small, so that these are cut too."""
    monkeypatch.setattr(shared_prefix, "parts_of_suffixes", lambda *args: request.param)
    monkeypatch.setattr(shared_prefix, "shared_prefix_tile", lambda *args: configs.Tile(16, 16, 4, 3))
    return int(request.param)


@pytest.mark.interpreter
@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("depth", "dtype"), [(200.0, FP16), (1e4, BF16), (1e4, FP32), (1e6, BF16)])
def test_scores_far_below_zero(depth: float, dtype: torch.dtype) -> None:
    batch, starts, lens = make_shared(GROUPS, groups=1, page=16, dim=32, dtype=dtype)
    sink(batch, depth)
    got = run(batch, starts, lens)
    assert_attention(batch, got)
    assert bool((got[1][got[1].isfinite()] < -0.5 * depth).all())
    without = [row for row, length in enumerate(batch.lengths) if not length]
    assert len(without) == 2 and not got[0][without].any() and bool((got[1][without] == -math.inf).all())


@pytest.mark.interpreter
@pytest.mark.usefixtures("parts")
def test_prefixes_within_prefixes_far_below_zero() -> None:
    tree: list[tuple[int, list[Group]]] = [(160, [(240, [70, 3]), (64, [20, 0])]), (0, [(32, [9]), (0, [200, None])])]
    batch, starts, lens = make_nested(tree, 2, groups=1, page=16, dim=32, dtype=BF16)
    sink(batch, 1e4)
    assert_attention(batch, run(batch, starts, lens))


@pytest.mark.gpu
@pytest.mark.parametrize(("depth", "dtype"), [(200.0, FP16), (1e4, BF16), (1e4, FP32)])
@pytest.mark.parametrize("rows", [1, 30])
def test_scores_far_below_zero_on_a_gpu(depth: float, dtype: torch.dtype, rows: int) -> None:
    """Suffixes of many parts where there are few rows, and of few where there are many."""
    groups: list[Group] = [(2048, [20, 3000, 0]), (0, [900, None]), (512, [0, 90])]
    batch, starts, lens = make_shared(groups * rows, groups=4, ratio=4, page=16, dim=128, dtype=dtype, device="cuda")
    sink(batch, depth)
    assert_attention(batch, run(batch, starts, lens))


def low(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score - 1e4


def not_the_suffix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx < PREFIX


def not_the_prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx >= PREFIX


def nothing_of_a_head(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return h != 1


def few_keys(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """One in a page and a half: whole tiles, and whole parts of suffixes, are hidden from some heads."""
    return (kv_idx % 24 == h) & (kv_idx < 96 + 16 * h)


PREFIX = 48
MASKS = (not_the_suffix, not_the_prefix, nothing_of_a_head, few_keys)
SINKS = {"no sinks": None, "sinks as low": torch.tensor([-1e4, -1e4 + 2, -1e4 - 3, -9990.0]), "sinks above": torch.zeros(4)}


@pytest.mark.interpreter
@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_that_hide_whole_parts(mask: Any, sinks: str) -> None:
    """With scores far below 0, sinks among them, above them, or none: then a query that sees nothing gives 0."""
    variant = Variant(score_mod=low, mask_mod=mask, sinks=SINKS[sinks])
    batch = make_batch([1, 1, 1], [300, 47, 60], shared=3, page=16, groups=1, ratio=4, dim=16, scattered=True)
    starts, lens = torch.tensor([0, 3]).int(), torch.tensor([PREFIX]).int()
    room = Workspace(batch.q.device)
    room.processors = 1
    out, lse = run(batch, starts, lens, workspace=room, variant=compile_variant(variant, 16, batch.q.device))
    wide = (x.to(FP64) for x in (batch.q, batch.k_pages, batch.v_pages))
    want, want_lse = variant_attention(*wide, plan_of(batch), variant, scale=batch.scale)
    # A score of 10,000 is rounded to 1e-3 in fp32.
    torch.testing.assert_close(out, want.float(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=5e-3, rtol=0)
