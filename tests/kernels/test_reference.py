"""Paged attention against a loop over queries in fp64, under FlashAttention's error criterion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels import ops
from hf_fastattn.kernels.plan import AttentionPlan
from hf_fastattn.kernels.reference import paged_attention
from hf_fastattn.kernels.softmax_state import attention_state, merge_states


def naive(q: Tensor, rows: list[tuple[Tensor, Tensor]], counts: list[int], scale: float, window=None, softcap=None):
    """One query and one head at a time, in the dtype given."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -math.inf, dtype=q.dtype)
    token = 0
    for (keys, values), count in zip(rows, counts, strict=True):
        group = q.shape[1] // keys.shape[1]
        for position in range(len(keys) - count, len(keys)):
            first = 0 if window is None else max(position - window + 1, 0)
            for head in range(q.shape[1]):
                seen = slice(first, position + 1)
                scores = keys[seen, head // group] @ q[token, head] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[token, head] = scores.softmax(0) @ values[seen, head // group]
                lse[token, head] = scores.logsumexp(0)
            token += 1
    return out, lse


def make_case(counts, pasts, *, page=4, groups=2, ratio=2, dim=16, dtype=torch.float32, scattered=False, shared=0):
    """Pages with NaN in every slot that holds no token; `shared` leading pages are common to all rows."""
    generator = torch.Generator().manual_seed(len(counts) + sum(pasts))
    lengths = [past + count for past, count in zip(pasts, counts, strict=True)]
    columns = [-(-length // page) for length in lengths]
    numbers = iter(torch.randperm(400, generator=generator).tolist() if scattered else range(400))
    prefix = [next(numbers) for _ in range(shared)]
    table = [prefix + [next(numbers) for _ in range(column - shared)] for column in columns]
    k_pages = torch.full((400, page, groups, dim), math.nan, dtype=dtype)
    v_pages = k_pages.clone()
    rows = []
    common = [torch.randn(shared * page, groups, dim, generator=generator) for _ in range(2)]
    for pages, length in zip(table, lengths, strict=True):
        slots = torch.tensor([pages[t // page] * page + t % page for t in range(length)], dtype=torch.long)
        pair = [torch.randn(length, groups, dim, generator=generator) for _ in range(2)]
        for full, own, same in zip((k_pages, v_pages), pair, common, strict=True):
            own[: shared * page] = same
            full.view(-1, groups, dim)[slots] = own.to(dtype)
        rows.append((pair[0].to(dtype), pair[1].to(dtype)))
    q = torch.randn(sum(counts), groups * ratio, dim, generator=generator).to(dtype)
    return q, k_pages, v_pages, table, lengths, rows


def check(q, k_pages, v_pages, table, lengths, rows, counts, *, window=None, softcap=None, prefixes=()):
    scale = q.shape[-1] ** -0.5
    plan = AttentionPlan(table, counts, lengths, k_pages.shape[1], window, prefixes)
    out, lse = paged_attention(q, k_pages, v_pages, plan, scale=scale, softcap=softcap)
    wide = [(k.double(), v.double()) for k, v in rows]
    want, want_lse = naive(q.double(), wide, counts, scale, window, softcap)
    plain, _ = naive(q, rows, counts, scale, window, softcap)
    assert out.dtype == q.dtype
    allowed = 2 * (plain.double() - want).abs().max() + 4 * torch.finfo(q.dtype).eps * want.abs().max()
    assert (out.double() - want).abs().max() <= allowed
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=5e-7)
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ragged_prefill_and_append(dtype, scattered, window, softcap):
    counts = [9, 1, 5, 0, 4]
    case = make_case(counts, [0, 3, 8, 6, 12], dtype=dtype, scattered=scattered)
    check(*case, counts, window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1, 4, 5, 7])
@pytest.mark.parametrize("pasts", [[0], [15], [16], [17], [40, 40, 40], [3, 31, 64]])
@pytest.mark.parametrize("scattered", [False, True])
def test_decode(dtype, ratio, pasts, scattered):
    counts = [1] * len(pasts)
    plan = check(*make_case(counts, pasts, page=16, ratio=ratio, dtype=dtype, scattered=scattered), counts)
    assert (plan.strided is not None) == (len(set(pasts)) == 1 and (not scattered or pasts[0] < 16))


@pytest.mark.parametrize("window", [1, 5, 16, 100])
def test_decode_window(window):
    counts = [1, 1, 1]
    check(*make_case(counts, [3, 20, 50]), counts, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scattered", [False, True])
def test_shared_prefix(dtype, scattered):
    counts, pasts, shared = [1] * 5, [129, 130, 128, 128, 140], 32
    case = make_case(counts, pasts, dtype=dtype, scattered=scattered, shared=shared)
    plan = check(*case, counts, prefixes=[(0, 5, shared)])
    assert len(plan.shared) == 1
    plan = check(*case, counts, prefixes=[(0, 2, shared), (2, 5, shared)])
    assert len(plan.shared) == 2


def test_extreme_logits():
    counts = [1, 4]
    q, *rest = make_case(counts, [30, 0])
    check(q * 1e3, *rest, counts)


def test_plain_path_agrees_with_the_fused_one(monkeypatch):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 9, 9))
    fused = attention_state(q, k, v, scale=0.3)
    monkeypatch.setattr("hf_fastattn.kernels.softmax_state._CPU_DTYPES", ())
    plain = attention_state(q, k, v, scale=0.3)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b)


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
    counts = [3, 1]
    q, k_pages, v_pages, table, lengths, _ = make_case(counts, [2, 6])
    k_pages, v_pages = (torch.nan_to_num(pages) for pages in (k_pages, v_pages))
    width = max(map(len, table))
    batch = (
        torch.tensor([row + [-1] * (width - len(row)) for row in table], dtype=torch.int32),
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
    )
    torch.library.opcheck(ops.paged_attention, (q, k_pages, v_pages, *batch, 0.25))
    k, v, cos, sin = torch.randn(4, 2, 16), torch.randn(4, 2, 16), torch.randn(4, 8), torch.randn(4, 8)
    slots = torch.tensor([1, 5, 9, 2])
    norm = torch.rand(16)
    torch.library.opcheck(ops.rope_append, (q, k, v, cos, sin, k_pages, v_pages, slots, norm, norm, 1e-6))
    out, lse = ops.paged_attention(q, k_pages, v_pages, *batch, 0.25)
    torch.library.opcheck(ops.merge_states, (out, lse, out.clone(), lse.clone()))
    with pytest.raises(ValueError, match="its 1 pages hold"):
        ops.paged_attention(q, k_pages, v_pages, batch[0][:, :1], batch[1], batch[2] * 9, 0.25)
