"""Paged attention in PyTorch against dense attention in fp64, under FlashAttention's error criterion."""

from __future__ import annotations

import math

import pytest
import torch

from hf_fastattn.kernels import ops
from hf_fastattn.kernels.attention import decode_reads, read_plan, reference, softmax_state
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.reference import paged_attention
from hf_fastattn.kernels.attention.softmax_state import attention_state, merge_states
from tests.kernels.cases import Batch, assert_attention, make_batch


def check(batch: Batch, *, window=None, softcap=None, prefixes=()):
    plan = ReadPlan(batch.table, batch.counts, batch.lengths, batch.k_pages.shape[1], window, prefixes)
    got = paged_attention(batch.q, batch.k_pages, batch.v_pages, plan, scale=batch.scale, softcap=softcap)
    assert_attention(batch, got, window=window, softcap=softcap)
    alone = reference.paged_output(batch.q, batch.k_pages, batch.v_pages, plan, scale=batch.scale, softcap=softcap)
    assert_attention(batch, (alone, got[1]), window=window, softcap=softcap)
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ragged_prefill_and_append(dtype, scattered, window, softcap):
    counts = [9, 1, 5, 0, 4]
    batch = make_batch(counts, [0, 3, 8, 6, 12], dtype=dtype, scattered=scattered)
    check(batch, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ratio", [1, 3])
def test_rows_that_are_alike(dtype, past, window, softcap, ratio, monkeypatch):
    monkeypatch.setattr(softmax_state, "BLOCK_SCORES", 100)
    monkeypatch.setattr(softmax_state, "LEAST_QUERIES", 2)
    monkeypatch.setattr(reference, "LEAST_QUERIES", 2)
    for rows in (1, 3):
        batch = make_batch([9] * rows, [past] * rows, ratio=ratio, dtype=dtype)
        assert check(batch, window=window, softcap=softcap).prefill is not None
        batch = make_batch([9] * rows, [past] * rows, ratio=ratio, dtype=dtype, scattered=True)
        assert check(batch, window=window, softcap=softcap).prefill is None
    # One more or less of anything, and each is computed by itself.
    for counts, pasts in (([9, 9, 8], [past] * 3), ([9] * 3, [past, past + 1, past]), ([0, 0], [past] * 2)):
        assert check(make_batch(counts, pasts, ratio=ratio, dtype=dtype), window=window, softcap=softcap).prefill is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1, 4, 5, 7])
@pytest.mark.parametrize("pasts", [[0], [15], [16], [17], [40, 40, 40], [3, 31, 64]])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("few", [0, 2**17])
def test_decode(dtype, ratio, pasts, scattered, few, monkeypatch):
    monkeypatch.setattr(decode_reads, "FEW_ELEMENTS", few)
    counts = [1] * len(pasts)
    plan = check(make_batch(counts, pasts, page=16, ratio=ratio, dtype=dtype, scattered=scattered))
    reads = plan.decode(32)
    assert (reads.strided is not None) == (len(set(pasts)) == 1 and (not scattered or pasts[0] < 16))
    assert (reads.skipped is not None) == (len(set(pasts)) == 1)


@pytest.mark.parametrize("window", [1, 5, 16, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("few", [0, 2**17])
def test_decode_window(window, softcap, scattered, few, monkeypatch):
    monkeypatch.setattr(decode_reads, "FEW_ELEMENTS", few)
    plan = check(make_batch([1, 1, 1], [3, 20, 50], scattered=scattered), window=window, softcap=softcap)
    assert plan.decode(32).is_small == bool(few)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scattered", [False, True])
def test_shared_prefix(dtype, scattered, monkeypatch):
    counts, pasts, shared = [1] * 5, [129, 130, 128, 128, 140], 32
    batch = make_batch(counts, pasts, dtype=dtype, scattered=scattered, shared=shared)
    width = batch.k_pages[0, 0].numel()
    monkeypatch.setattr(read_plan, "MIN_SHARED_ELEMENTS", 0)
    plan = check(batch, prefixes=[(0, 5, shared)])
    assert len(plan.decode(width).shared) == 1
    plan = check(batch, prefixes=[(0, 2, shared), (2, 5, shared)])
    assert len(plan.decode(width).shared) == 2


@pytest.mark.parametrize("scattered", [False, True])
def test_a_short_prefix_is_read_by_each_row(scattered):
    batch = make_batch([1] * 5, [64] * 5, page=16, scattered=scattered, shared=4)
    width = batch.k_pages[0, 0].numel()
    plan = check(batch, prefixes=[(0, 5, 4)])
    assert not plan.decode(width).shared and plan.decode(width).skipped == 0
    assert len(plan.decode(read_plan.MIN_SHARED_ELEMENTS // 256).shared) == 1


def test_extreme_logits():
    check(make_batch([1, 4], [30, 0], factor=1e3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("block", [1, 2**18])
def test_plain_path_agrees_with_the_fused_one(causal, biased, block, monkeypatch):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (9 if causal else 5, 9, 9))
    options = {"causal": causal, "bias": torch.randn(q.shape[2], 9) if biased else None}
    fused = attention_state(q, k, v, scale=0.3, **({"bias": _both(**options)} if biased else options))
    monkeypatch.setattr(softmax_state, "_CPU_DTYPES", ())
    monkeypatch.setattr(softmax_state, "BLOCK_SCORES", block)
    monkeypatch.setattr(softmax_state, "LEAST_QUERIES", 2)
    plain = attention_state(q, k, v, scale=0.3, **options)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b)


def _both(causal, bias):
    """PyTorch's takes one of them."""
    return bias.masked_fill(torch.ones_like(bias, dtype=torch.bool).triu(1), -math.inf) if causal else bias


def test_gradients_of_the_plain_path(monkeypatch):
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    monkeypatch.setattr(softmax_state, "BLOCK_SCORES", 1)
    monkeypatch.setattr(softmax_state, "LEAST_QUERIES", 2)
    bias = torch.randn(4, 4, dtype=torch.float64)
    options = {"scale": 0.3, "causal": True, "bias": bias, "softcap": 2.0}
    assert torch.autograd.gradcheck(lambda *given: attention_state(*given, **options), (q, k, v))


def test_merge_states_is_exact_and_takes_empty_states():
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    whole = attention_state(q, k, v, scale=1.0)
    parts = [attention_state(q, k[:, :, s], v[:, :, s], scale=1.0) for s in (slice(0, 4), slice(4, 10))]
    for got, want in zip(merge_states(*parts[0], *parts[1]), whole, strict=True):
        torch.testing.assert_close(got, want)
    empty = torch.zeros_like(whole[0]), torch.full_like(whole[1], -math.inf)
    for got, want in zip(merge_states(*whole, *empty), whole, strict=True):
        torch.testing.assert_close(got, want)
    out, lse = merge_states(*empty, *empty)
    assert not out.any() and bool((lse == -math.inf).all())


def test_operators_pass_opcheck():
    case = make_batch([3, 1], [2, 6])
    q, k_pages, v_pages = case.q, torch.nan_to_num(case.k_pages), torch.nan_to_num(case.v_pages)
    batch = case.page_table, case.cu_seqlens_q, case.seq_lens
    torch.library.opcheck(ops.paged_attention, (q, k_pages, v_pages, *batch, 0.25))
    k, v, cos, sin = torch.randn(4, 2, 16), torch.randn(4, 2, 16), torch.randn(4, 8), torch.randn(4, 8)
    slots = torch.tensor([1, 5, 9, 2])
    norm = torch.rand(16)
    torch.library.opcheck(ops.rope_append, (q, k, v, cos, sin, k_pages, v_pages, slots, norm, norm, 1e-6))
    out, lse = ops.paged_attention(q, k_pages, v_pages, *batch, 0.25)
    torch.library.opcheck(ops.merge_states, (out, lse, out.clone(), lse.clone()))
    with pytest.raises(ValueError, match="its 1 pages hold"):
        ops.paged_attention(q, k_pages, v_pages, batch[0][:, :1], batch[1], batch[2] * 9, 0.25)
