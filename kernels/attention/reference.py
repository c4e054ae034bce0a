"""Paged attention in plain PyTorch: the oracle of every other backend, and the default on a CPU.

For row b with L tokens in its pages and S new queries at positions `L - S .. L - 1`, query i sees the keys j <= i, and
with a window W only those with j > i - W. Grouped-query attention (Ainslie et al., 2023) never repeats a key: the R
query heads of a kv head are folded into the query length (decode) or read one expanded key head (prefill). A shared prefix
is one block of keys for the queries of all its rows (Ye et al., 2024, "Cascade Inference").
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from hf_fastattn.kernels.attention.decode_reads import DecodeReads, Run
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.attention.softmax_state import attention_state, merge_states
from hf_fastattn.kernels.page_formats import dequantised, is_eight_bits

# Queries of a long append at a time, so that their score bias takes a few megabytes at most; as many as a window has keys
# if these are fewer, since each block reads the keys of all its windows, but so many at least.
QUERY_BLOCK, LEAST_QUERIES = 512, 64


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
    keys, values = _tokens(q, k_pages, v_pages, plan)
    if plan.is_decode:
        return _decode(q, keys, values, plan, scale, softcap)
    states = [_prefill(*part, plan, scale, softcap) for part in _parts(q, keys, values, plan)]
    return states[0] if len(states) == 1 else (torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states]))


def paged_output(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: ReadPlan, *, scale: float, softcap: float | None = None
) -> Tensor:
    """The output of `paged_attention`, for callers that need no LSE.

    On a CPU it costs less than both: PyTorch's attention, of which only the operation underneath gives an LSE, repeats no
    keys for the query heads that share them.
    """
    if plan.is_decode or softcap is not None or q.device.type != "cpu":
        return paged_attention(q, k_pages, v_pages, plan, scale=scale, softcap=softcap)[0]
    parts = [_prefilled(*part, plan, scale) for part in _parts(q, *_tokens(q, k_pages, v_pages, plan), plan)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tokens(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: ReadPlan) -> tuple[Tensor, Tensor]:
    """Keys and values as `[N * P, G, D]`."""
    if is_eight_bits(k_pages):
        k_pages, v_pages = dequantised(k_pages, v_pages, q.dtype, plan.pages_read)
    return k_pages.flatten(0, 1), v_pages.flatten(0, 1)


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
    if reads.is_small and keys.device.type == "cpu":
        # Each operation takes longer than so small a copy.
        slots, bias = reads.filled_up(keys.device)
        shape = (grouped.shape[0], -1, *keys.shape[1:])
        k, v = (tokens.index_select(0, slots).view(shape).transpose(1, 2) for tokens in (keys, values))
        return attention_state(grouped, k, v, scale=scale, bias=bias, softcap=softcap)
    states = []
    for row, run in enumerate(reads.rows):
        query = grouped[row : row + 1]
        if run.length == 0:
            states.append((torch.zeros_like(query), query.new_full(query.shape[:-1], -math.inf).float()))
            continue
        k, v = _read(keys, run, plan), _read(values, run, plan)
        states.append(attention_state(query, k, v, scale=scale, softcap=softcap))
    return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])


def _parts(q: Tensor, keys: Tensor, values: Tensor, plan: ReadPlan) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Of rows that are computed together the first one, their queries, and their keys and values `[B, G, L, D]`."""
    # On a GPU the scores of all rows at once may take too much memory.
    if q.device.type == "cpu" and plan.prefill is not None:
        first, step, length = plan.prefill
        shape = (len(plan.seq_lens), keys.shape[1], length, keys.shape[2])
        yield 0, q, _strided(keys, shape, first, step), _strided(values, shape, first, step)
        return
    for row, (lo, hi) in enumerate(zip(plan.cu_seqlens_q, plan.cu_seqlens_q[1:], strict=False)):
        run = plan.rows[row]
        yield row, q[lo:hi], _read(keys, run, plan), _read(values, run, plan)


def _prefill(
    row: int, q: Tensor, k: Tensor, v: Tensor, plan: ReadPlan, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """A part's output `[T, H, D]` and LSE `[T, H]`."""
    rows, groups = k.shape[:2]
    heads, dim = q.shape[1:]
    tokens, share = len(q) // rows, heads // groups
    if not tokens:
        return q, q.new_zeros(q.shape[:2], dtype=torch.float32)
    if rows == 1:
        # [S, H, D] -> [G, R, S, D]; the keys [1, G, L, D] -> [G, R, L, D] with stride 0 over R
        query = q.view(tokens, groups, share, dim).permute(1, 2, 0, 3)
        k, v = (x[0].unsqueeze(1).expand(-1, share, -1, -1) for x in (k, v))
    else:
        query = q.view(rows, tokens, heads, dim).transpose(1, 2)
        k, v = (x if share == 1 else x.repeat_interleave(share, 1) for x in (k, v))
    states = [
        attention_state(_at(query, new), _at(k, seen), _at(v, seen), scale=scale, causal=causal, bias=bias, softcap=softcap)
        for new, seen, causal, bias in _blocks(row, tokens, plan, q.device)
    ]
    out, lse = states[0] if len(states) == 1 else (torch.cat(parts, 2) for parts in zip(*states, strict=True))
    # Both are [1, G, R, S, ...] or [B, 1, H, S, ...] now.
    out, lse = out.unflatten(0, (rows, -1)), lse.unflatten(0, (rows, -1))
    return out.permute(0, 3, 1, 2, 4).reshape(-1, heads, dim), lse.permute(0, 3, 1, 2).reshape(-1, heads)


def _prefilled(row: int, q: Tensor, k: Tensor, v: Tensor, plan: ReadPlan, scale: float) -> Tensor:
    """A part's output `[T, H, D]` by PyTorch's attention."""
    heads, dim = q.shape[1:]
    if not len(q):
        return q
    query = q.view(k.shape[0], -1, heads, dim).transpose(1, 2)
    outs = [
        functional.scaled_dot_product_attention(
            _at(query, new), _at(k, seen), _at(v, seen), None if bias is None else bias.to(q.dtype),
            is_causal=causal, scale=scale, enable_gqa=heads > k.shape[1],
        )
        for new, seen, causal, bias in _blocks(row, query.shape[2], plan, q.device)
    ]  # fmt: skip
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    return out.transpose(1, 2).reshape(-1, heads, dim)


def _blocks(
    row: int, tokens: int, plan: ReadPlan, device: torch.device
) -> Iterator[tuple[slice | None, slice | None, bool, Tensor | None]]:
    """The blocks of a row's queries: which they are, which keys they see, whether causally, and the bias of the scores.

    For all of them there is None: PyTorch would make views of tensors as they are.
    """
    past, start, window = plan.seq_lens[row] - tokens, plan.rows[row].start, plan.window
    if past == 0 and (window is None or window >= tokens):
        yield None, None, True, None
        return
    step = QUERY_BLOCK if window is None else min(QUERY_BLOCK, max(window, LEAST_QUERIES))
    for lo in range(0, tokens, step):
        hi = min(lo + step, tokens)
        q_lo, q_hi = past + lo, past + hi
        k_lo = start if window is None else max(start, q_lo - window + 1)
        yield slice(lo, hi), slice(k_lo - start, q_hi - start), False, plan.bias((q_lo, q_hi), (k_lo, q_hi), device)


def _at(x: Tensor, tokens: slice | None) -> Tensor:
    return x if tokens is None else x[:, :, tokens]


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
