"""Paged attention in plain PyTorch: the oracle of every other backend, and the default on a CPU.

For row b with L tokens in its pages and S new queries at positions `L - S .. L - 1`, query i sees the keys j <= i, and
with a window W only those with j > i - W. Grouped-query attention (Ainslie et al., 2023) never repeats a key: the R
query heads of a kv head are folded into the query length (decode) or read one expanded key head (prefill). A shared prefix
is one block of keys for the queries of all its rows (Ye et al., 2024, "Cascade Inference").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_fastattn.kernels.attention.decode_reads import DecodeReads, Run
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.softmax_state import attention_state, merge_states
from hf_fastattn.kernels.page_formats import dequantised, is_eight_bits

# Queries of a long append at a time, so that their score bias takes a few megabytes at most.
QUERY_BLOCK = 512


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: ReadPlan,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed queries over paged keys and values.

    Args:
        q: `[T, H, D]` queries after RoPE, row after row as `plan.query_lens` says.
        k_pages: `[N, P, G, D]` pages of keys; `v_pages` of values. Slots that hold no token are never read. Those of 8 bits
            are dequantised, up to the last page that the plan reads.
        plan: the batch: page table, lengths, window and shared prefixes.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.

    Returns:
        Output `[T, H, D]` in q's dtype, LSE `[T, H]` in fp32, natural logarithm.
    """
    if is_eight_bits(k_pages):
        k_pages, v_pages = dequantised(k_pages, v_pages, q.dtype, plan.pages_read)
    keys, values = k_pages.flatten(0, 1), v_pages.flatten(0, 1)
    if plan.is_decode:
        return _decode(q, keys, values, plan, scale, softcap)
    states = [
        _prefill_row(q[lo:hi], keys, values, plan, row, scale, softcap)
        for row, (lo, hi) in enumerate(zip(plan.cu_seqlens_q, plan.cu_seqlens_q[1:], strict=False))
    ]
    return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, plan: ReadPlan, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    rows, heads, dim = q.shape
    groups = keys.shape[1]
    grouped = q.view(rows, groups, heads // groups, dim)
    reads = plan.decode(groups * dim)
    out, lse = _decode_rows(grouped, keys, values, plan, reads, scale, softcap)
    for prefix in reads.shared:
        lo, hi = prefix.first_row, prefix.last_row
        k = _read(keys, prefix.run, plan)
        v = _read(values, prefix.run, plan)
        # [rows, G, R, D] -> [1, G, rows * R, D]: one matrix product for all the rows of the prefix
        together = grouped[lo:hi].transpose(0, 1).reshape(1, groups, -1, dim)
        p_out, p_lse = attention_state(together, k, v, scale=scale, softcap=softcap)
        p_out = p_out.view(groups, hi - lo, -1, dim).transpose(0, 1)
        p_lse = p_lse.view(groups, hi - lo, -1).transpose(0, 1)
        merged = merge_states(out[lo:hi], lse[lo:hi], p_out, p_lse)
        if hi - lo == rows:
            out, lse = merged
        else:
            out[lo:hi], lse[lo:hi] = merged
    return out.reshape(rows, heads, dim), lse.reshape(rows, heads)


def _decode_rows(
    grouped: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: ReadPlan,
    reads: DecodeReads,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Each row over its own keys, without the shared prefix; `grouped` is `[B, G, R, D]`."""
    if reads.strided is not None:
        first, step, length = reads.strided
        shape = (grouped.shape[0], keys.shape[1], length, keys.shape[2])
        k, v = (_strided(tokens, shape, first, step) for tokens in (keys, values))
        return attention_state(grouped, k, v, scale=scale, softcap=softcap)
    if reads.skipped is not None:
        k, v = (_gathered(tokens, reads) for tokens in (keys, values))
        return attention_state(grouped, k, v, scale=scale, softcap=softcap)
    states = []
    for row, run in enumerate(reads.rows):
        query = grouped[row : row + 1]
        if run.length == 0:
            states.append((torch.zeros_like(query), query.new_full(query.shape[:-1], -math.inf).float()))
            continue
        k, v = _read(keys, run, plan), _read(values, run, plan)
        states.append(attention_state(query, k, v, scale=scale, softcap=softcap))
    return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])


def _prefill_row(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: ReadPlan,
    row: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """One row's queries `[S, H, D]` over its pages."""
    tokens, heads, dim = q.shape
    groups = keys.shape[1]
    if tokens == 0:
        return q, q.new_zeros(0, heads, dtype=torch.float32)
    run = plan.rows[row]
    past = plan.seq_lens[row] - tokens
    # [S, H, D] -> [G, R, S, D]; the keys [1, G, L, D] -> [G, R, L, D] with stride 0 over R
    query = q.view(tokens, groups, heads // groups, dim).permute(1, 2, 0, 3)
    k, v = (_read(pages, run, plan)[0].unsqueeze(1).expand(-1, heads // groups, -1, -1) for pages in (keys, values))
    if past == 0 and (plan.window is None or plan.window >= tokens):
        out, lse = attention_state(query, k, v, scale=scale, causal=True, softcap=softcap)
        return out.permute(2, 0, 1, 3).reshape(tokens, heads, dim), lse.permute(2, 0, 1).reshape(tokens, heads)
    outs, lses = [], []
    for lo in range(0, tokens, QUERY_BLOCK):
        hi = min(lo + QUERY_BLOCK, tokens)
        q_lo, q_hi = past + lo, past + hi
        k_lo = max(run.start, q_lo - plan.window + 1) if plan.window is not None else run.start
        block = slice(k_lo - run.start, q_hi - run.start)
        bias = plan.bias((q_lo, q_hi), (k_lo, q_hi), q.device)
        out, lse = attention_state(
            query[:, :, lo:hi], k[:, :, block], v[:, :, block], scale=scale, bias=bias, softcap=softcap
        )
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, dim), lse.permute(2, 0, 1).reshape(tokens, heads)


def _read(tokens: Tensor, run: Run, plan: ReadPlan) -> Tensor:
    """A run of `[N * P, G, D]` as `[1, G, L, D]`: a view where its slots are adjacent, else a gathered copy."""
    if run.first_slot is not None:
        return tokens[run.first_slot : run.first_slot + run.length].transpose(0, 1)[None]
    return tokens.index_select(0, plan.slots_of(run, tokens.device)).transpose(0, 1)[None]


def _strided(tokens: Tensor, shape: tuple[int, int, int, int], first: int, step: int) -> Tensor:
    """Rows of adjacent slots at equal distances as one `[B, G, L, D]` view of `[N * P, G, D]`."""
    per_token, per_head, per_dim = tokens.stride()
    strides = (step * per_token, per_head, per_token, per_dim)
    return tokens.as_strided(shape, strides, tokens.storage_offset() + first * per_token)


def _gathered(tokens: Tensor, reads: DecodeReads) -> Tensor:
    """Equally long rows whose pages lie anywhere as `[B, G, L, D]`: whole pages copied, slots without a token left out."""
    assert reads.skipped is not None
    paged = tokens.view(-1, reads.page_size, *tokens.shape[1:])
    rows = paged.index_select(0, reads.pages(tokens.device)).view(len(reads.rows), -1, *tokens.shape[1:])
    return rows[:, reads.skipped : reads.skipped + reads.rows[0].length].transpose(1, 2)
