"""The reference of variants against PyTorch's `flex_attention`, row by row, with the same functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hf_fastattn.kernels.attention import variant_reference
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.cases import Batch, make_batch
from tests.kernels.variants.mods import MODS, Mod

# New tokens and earlier ones of each row, and pages that all rows have in common.
BATCHES = {
    "prefill": ([23, 60], [0, 0], 0),
    "append": ([9, 1, 20], [30, 63, 100], 0),
    "decode": ([1, 1, 1], [0, 90, 200], 0),
    "shared prefix": ([1, 1, 1], [140, 133, 131], 8),
}


def plan_of(batch: Batch, shared: int = 0) -> ReadPlan:
    prefixes = [(0, len(batch.table), shared)] if shared else []
    return ReadPlan(batch.table, batch.counts, batch.lengths, batch.k_pages.shape[1], None, prefixes)


def flex(batch: Batch, mod: Mod) -> torch.Tensor:
    """`[T, H, D]`; FlexAttention counts queries from 0, and has no causality of its own."""
    outs = []
    for row, (q, (keys, values), length) in enumerate(
        zip(batch.q.split(batch.counts), batch.rows, batch.lengths, strict=True)
    ):
        past = length - len(q)

        def score(s, b, h, i, j, row=row, past=past):
            return s if mod.score is None else mod.score(s, row + b, h, i + past, j)

        def mask(b, h, i, j, row=row, past=past):
            seen = i >= -1 if mod.mask is None else mod.mask(row + b, h, i + past, j)
            return seen & (i + past >= j) if mod.causal else seen

        block_mask = create_block_mask(mask, 1, q.shape[1], len(q), length, device="cpu")
        inputs = (x.transpose(0, 1)[None] for x in (q, keys, values))
        out = flex_attention(*inputs, score, block_mask, scale=batch.scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.fixture
def without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as PyTorch's operations; it would be traced anew for each function, which takes seconds."""
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.usefixtures("without_compiling")
@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", MODS)
def test_equals_flex_attention(name, kind, ratio):
    counts, pasts, shared = BATCHES[kind]
    batch = make_batch(
        counts, pasts, page=16, ratio=ratio, groups=4 if ratio == 7 else 2, dim=16, scattered=True, shared=shared
    )
    mod = MODS[name]
    variant = Variant(score_mod=mod.score, mask_mod=mod.mask, causal=mod.causal)
    out, lse = variant_attention(batch.q, batch.k_pages, batch.v_pages, plan_of(batch, shared), variant, scale=batch.scale)
    torch.testing.assert_close(out, flex(batch, mod), atol=1e-5, rtol=1e-5)
    assert lse.shape == out.shape[:2] and not lse.isnan().any()


@pytest.mark.parametrize("most", [1, 3000, 50_000])
@pytest.mark.parametrize("kind", BATCHES)
def test_scores_computed_in_parts(kind, most, monkeypatch):
    counts, pasts, shared = BATCHES[kind]
    batch = make_batch(counts, pasts, page=16, ratio=2, groups=2, dim=16, scattered=True, shared=shared)
    variant = Variant(score_mod=lambda s, b, h, q, k: s + (b + 1) * 0.1 * (k - q), window=50)
    given = (batch.q, batch.k_pages, batch.v_pages, plan_of(batch), variant)
    want = variant_attention(*given, scale=batch.scale)
    monkeypatch.setattr(variant_reference, "MOST_SCORES", most)
    torch.testing.assert_close(variant_attention(*given, scale=batch.scale), want, atol=1e-6, rtol=1e-6)


def test_rows_without_queries_or_keys():
    batch = make_batch([2, 0, 1], [3, 5, 0], page=16, ratio=2, groups=2, dim=16)
    variant = Variant(score_mod=lambda s, b, h, q, k: s.double() + k, sinks=torch.zeros(4))
    out, lse = variant_attention(batch.q, batch.k_pages, batch.v_pages, plan_of(batch), variant, scale=batch.scale)
    assert out.dtype == torch.float32 and out.shape == batch.q.shape and not out.isnan().any() and not lse.isnan().any()
