"""Paged attention with a `Variant` in plain PyTorch: its functions as they are, for all pairs at once by `torch.vmap`.

`s = score_mod(softcap(scale * q k^T) + alibi)`, -inf where causality, the window or `mask_mod` hides the key; then
`softmax(s) v`, with the heads' sinks in the sum, or `sigmoid(s) v`. The oracle of the Triton kernels, and what a CPU runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn import functional

from hf_fastattn.kernels.attention.decode_reads import Run
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.variants.variant import Variant, is_triton

# Scores computed at a time.
MOST_SCORES = 2**24


def variant_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: ReadPlan, variant: Variant, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of packed queries over paged keys and values.

    Args:
        q: `[T, H, D]` queries after RoPE, row after row as `plan.query_lens` says.
        k_pages: `[N, P, G, D]` pages of keys; `v_pages` of values. Slots that hold no token are never read.
        plan: the batch: page table, lengths, and the model's own window. Each row reads a shared prefix for itself.
        scale: factor on the scores.

    Returns:
        Output `[T, H, D]` in q's dtype; LSE `[T, H]` in fp32, natural logarithm: of sigmoid attention of its weights' sum.

    Raises:
        ValueError: a function is one of Triton.
    """
    functions = variant.functions()
    for hook, function in functions.items():
        if is_triton(function):
            raise ValueError(f"{hook} is a @triton.jit function, which the reference cannot run; give a PyTorch function")
    plan = dataclasses.replace(plan, prefixes=(), _indices={})
    bounds = plan.cu_seqlens_q
    parts = [
        _rows(q[bounds[first] : bounds[last]], k_pages.flatten(0, 1), v_pages.flatten(0, 1), plan, range(first, last),
              variant, functions, scale)
        for first, last in _batches(plan, q.shape[1])
    ]  # fmt: skip
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _batches(plan: ReadPlan, heads: int) -> Iterator[tuple[int, int]]:
    """Rows from the first to before the second, whose scores are computed at once: a call of a function takes its time."""
    first, tokens, longest = 0, 0, 0
    for row, (run, count) in enumerate(zip(plan.rows, plan.query_lens, strict=True)):
        tokens, longest = tokens + count, max(longest, run.length)
        if row > first and heads * tokens * longest > MOST_SCORES:
            yield first, row
            first, tokens, longest = row, count, run.length
    yield first, len(plan.rows)


def _rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: ReadPlan,
    rows: range,
    variant: Variant,
    functions: dict[str, Callable[..., Any]],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The queries `[S, H, D]` of some rows, each over its pages."""
    runs, counts, wide = [plan.rows[row] for row in rows], [plan.query_lens[row] for row in rows], _wide(q)
    lengths = [run.length for run in runs]
    positions = torch.cat([_range(run.start, run.start + run.length, q.device) for run in runs])
    q_idx = torch.cat([_range(plan.seq_lens[row] - plan.query_lens[row], plan.seq_lens[row], q.device) for row in rows])
    b = torch.repeat_interleave(_range(rows.start, rows.stop, q.device), torch.tensor(counts, device=q.device))
    slots = [plan.slots_of(run, q.device) if run.first_slot is None else _slots(run) for run in runs]
    k = torch.cat([keys[place] for place in slots]).to(wide)
    k = _transformed(functions.get("key_transform"), k, positions).to(q.dtype).to(wide).split(lengths)
    query = _transformed(functions.get("query_transform"), q.to(wide), q_idx).to(q.dtype).to(wide)
    windows = [window for window in (plan.window, variant.window) if window is not None]
    heads, longest = q.shape[1], max(lengths)
    # More scores than at once only of a single row.
    step = max(MOST_SCORES // max(heads * longest, 1), 1) if len(rows) == 1 else max(len(q), 1)
    kv_idx = torch.stack([_padded(place, longest) for place in positions.split(lengths)])
    there = _range(0, longest, q.device) < torch.tensor(lengths, device=q.device)[:, None]
    outs, lses = [], []
    for lo in range(0, len(q), step):
        block = slice(lo, lo + step)
        places, own = q_idx[block], (b[block] - rows.start).long()
        pieces = query[block].split(counts) if len(rows) > 1 else (query[block],)
        scores = [
            functional.pad(_scores(piece, k[at], scale), (0, longest - lengths[at])) for at, piece in enumerate(pieces)
        ]
        seen = there[own]
        modified = _modified(
            torch.cat(scores, 1), b[block], places, kv_idx[own], seen, min(windows, default=None), variant.causal, functions
        )
        for at, piece in enumerate(modified.split(counts, 1) if len(rows) > 1 else (modified,)):
            own_values = values[slots[at]].to(wide)
            out, lse = _weighted(piece[..., : lengths[at]], own_values, variant.sinks, variant.normalizer)
            outs.append(out)
            lses.append(lse)
    if not outs:
        return q, q.new_zeros(0, heads, dtype=torch.float32)
    out = _transformed(functions.get("output_transform"), torch.cat(outs), q_idx)
    return out.to(q.dtype), torch.cat(lses).float()


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _slots(run: Run) -> slice:
    assert run.first_slot is not None
    return slice(run.first_slot, run.first_slot + run.length)


def _padded(positions: Tensor, length: int) -> Tensor:
    """`positions`, the last one again and again up to `length`: places of no key that functions may be called with."""
    if not len(positions):
        return positions.new_zeros(length)
    return torch.cat((positions, positions[-1:].expand(length - len(positions))))


def _range(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32, device=device)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`[H, S, L]` of `q: [S, H, D]` and `k: [L, G, D]`; no key is repeated."""
    (tokens, heads, dim), groups = q.shape, k.shape[1]
    ratio = heads // groups
    grouped = q.view(tokens, groups, ratio, dim).permute(1, 2, 0, 3).reshape(groups, ratio * tokens, dim)
    return torch.matmul(grouped, k.permute(1, 2, 0)).view(heads, tokens, len(k)) * scale


def _transformed(function: Callable[..., Any] | None, x: Tensor, positions: Tensor) -> Tensor:
    """`x: [S, heads, D]` after a transform of its vectors."""
    if function is None or not x.numel():
        return x
    h = _range(0, x.shape[1], x.device)
    with TransformGetItemToIndex():
        return torch.vmap(torch.vmap(function, (0, 0, None)), (0, None, 0))(x, h, positions)


def _modified(
    scores: Tensor,
    b: Tensor,
    q_idx: Tensor,
    key: Tensor,
    seen: Tensor,
    window: int | None,
    causal: bool,
    functions: dict[str, Callable[..., Any]],
) -> Tensor:
    """Scores `[H, S, L]` after `score_mod`, -inf where a query does not see the key.

    Args:
        b: `[S]` the rows of the queries at `q_idx: [S]`.
        key: `[S, L]` positions of keys.
        seen: `[S, L]`, which of them are there.
    """
    query, nearest = q_idx[:, None], key
    # What is hidden here, functions do not see: they get the nearest visible key in place of it.
    if causal:
        seen, nearest = seen & (key <= query), torch.minimum(nearest, query)
    if window is not None:
        seen, nearest = seen & (key > query - window), torch.maximum(nearest, query - window + 1)
    h = _range(0, len(scores), scores.device)
    if "score_mod" in functions and scores.numel():
        scores = _for_all_pairs(functions["score_mod"], (0,))(scores, b, h, q_idx, nearest).to(scores.dtype)
    if "mask_mod" in functions and scores.numel():
        seen = seen & _for_all_pairs(functions["mask_mod"], ())(b, h, q_idx, nearest)
    return scores.masked_fill(~seen, -math.inf)


def _for_all_pairs(function: Callable[..., Any], first: tuple[int, ...]) -> Callable[..., Tensor]:
    """`function` of `(b, h, q_idx, kv_idx)` for `b: [S]`, `h: [H]`, `q_idx: [S]` and `kv_idx: [S, L]`: `[H, S, L]`."""
    for dims in ((None, None, None, 0), (0, None, 0, 0), (None, 0, None, None)):
        function = torch.vmap(function, (*first, *dims))

    def run(*args: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            return function(*args)

    return run


def _weighted(scores: Tensor, v: Tensor, sinks: Tensor | None, normalizer: str) -> tuple[Tensor, Tensor]:
    """Output `[S, H, D]` and LSE `[S, H]` of scores `[H, S, L]` and values `[L, G, D]`."""
    heads, tokens, length = scores.shape
    if normalizer == "sigmoid":
        weights = torch.sigmoid(scores)
        lse = weights.sum(-1).log()
    else:
        lse = scores.logsumexp(-1) if length else scores.new_full((heads, tokens), -math.inf)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    grouped = weights.view(v.shape[1], heads // v.shape[1] * tokens, length)
    out = torch.matmul(grouped, v.transpose(0, 1)).view(heads, tokens, v.shape[2])
    return out.transpose(0, 1), lse.transpose(0, 1)
