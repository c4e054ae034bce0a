"""Paged attention with a `Variant` in plain PyTorch: its functions as they are, for all pairs at once by `torch.vmap`.

`s = score_mod(softcap(scale * q k^T) + alibi)`, -inf where causality, the window or `mask_mod` hides the key; then
`softmax(s) v`, with the heads' sinks in the sum, or `sigmoid(s) v`. The oracle of the Triton kernels, and what a CPU runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

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
    rows = [
        _row(q[lo:hi], k_pages.flatten(0, 1), v_pages.flatten(0, 1), plan, row, variant, functions, scale)
        for row, (lo, hi) in enumerate(zip(plan.cu_seqlens_q, plan.cu_seqlens_q[1:], strict=False))
    ]
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])


def _row(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    plan: ReadPlan,
    row: int,
    variant: Variant,
    functions: dict[str, Callable[..., Any]],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The queries `[S, H, D]` of one row over its pages."""
    run, wide = plan.rows[row], torch.promote_types(q.dtype, torch.float32)
    slots = plan.slots_of(run, q.device) if run.first_slot is None else slice(run.first_slot, run.first_slot + run.length)
    positions = _range(run.start, run.start + run.length, q.device)
    k = _transformed(functions.get("key_transform"), keys[slots].to(wide), positions).to(q.dtype).to(wide)
    v = values[slots].to(wide)
    tokens, heads, _ = q.shape
    past = plan.seq_lens[row] - tokens
    query = _transformed(functions.get("query_transform"), q.to(wide), _range(past, past + tokens, q.device))
    query = query.to(q.dtype).to(wide)
    window = min((w for w in (plan.window, variant.window) if w is not None), default=None)
    step = max(MOST_SCORES // max(heads * run.length, 1), 1)
    parts = []
    for lo in range(0, tokens, step):
        q_idx = _range(past + lo, past + min(lo + step, tokens), q.device)
        scores = _scores(query[lo : lo + step], k, scale)
        scores = _modified(scores, q_idx, positions, row, window, variant.causal, functions)
        out, lse = _weighted(scores, v, functions.get("sink"), variant.normalizer)
        parts.append((_transformed(functions.get("output_transform"), out, q_idx), lse))
    if not parts:
        return q, q.new_zeros(0, heads, dtype=torch.float32)
    return torch.cat([out for out, _ in parts]).to(q.dtype), torch.cat([lse for _, lse in parts]).float()


def _range(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32, device=device)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`[H, S, L]` of `q: [S, H, D]` and `k: [L, G, D]`; no key is repeated."""
    (tokens, heads, dim), groups = q.shape, k.shape[1]
    grouped = q.view(tokens, groups, -1, dim).permute(1, 2, 0, 3).reshape(groups, -1, dim)
    return torch.matmul(grouped, k.permute(1, 2, 0)).view(heads, tokens, -1) * scale


def _transformed(function: Callable[..., Any] | None, x: Tensor, positions: Tensor) -> Tensor:
    """`x: [S, heads, D]` after a transform of its vectors."""
    if function is None or not x.numel():
        return x
    h = _range(0, x.shape[1], x.device)
    with TransformGetItemToIndex():
        return torch.vmap(torch.vmap(function, (0, 0, None)), (0, None, 0))(x, h, positions)


def _modified(
    scores: Tensor,
    q_idx: Tensor,
    kv_idx: Tensor,
    row: int,
    window: int | None,
    causal: bool,
    functions: dict[str, Callable[..., Any]],
) -> Tensor:
    """Scores `[H, S, L]` after `score_mod`, -inf where a query does not see the key."""
    query, key = q_idx[:, None], kv_idx[None].expand(len(q_idx), -1)
    seen = torch.ones_like(key, dtype=torch.bool)
    # What is hidden here, functions do not see: they get the nearest visible key in place of it.
    nearest = key
    if causal:
        seen, nearest = seen & (key <= query), torch.minimum(nearest, query)
    if window is not None:
        seen, nearest = seen & (key > query - window), torch.maximum(nearest, query - window + 1)
    b, h = torch.tensor(row, dtype=torch.int32, device=scores.device), _range(0, len(scores), scores.device)
    if "score_mod" in functions and scores.numel():
        scores = _for_all_pairs(functions["score_mod"], (0,))(scores, b, h, q_idx, nearest)
    if "mask_mod" in functions and scores.numel():
        seen = seen & _for_all_pairs(functions["mask_mod"], ())(b, h, q_idx, nearest)
    return scores.masked_fill(~seen, -math.inf)


def _for_all_pairs(function: Callable[..., Any], first: tuple[int, ...]) -> Callable[..., Tensor]:
    """`function` of `(b, h, q_idx, kv_idx)` for `h: [H]`, `q_idx: [S]` and `kv_idx: [S, L]`: `[H, S, L]`."""
    for dims in ((None, None, None, 0), (None, None, 0, 0), (None, 0, None, None)):
        function = torch.vmap(function, (*first, *dims))

    def run(*args: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            return function(*args)

    return run


def _weighted(scores: Tensor, v: Tensor, sink: Callable[..., Any] | None, normalizer: str) -> tuple[Tensor, Tensor]:
    """Output `[S, H, D]` and LSE `[S, H]` of scores `[H, S, L]` and values `[L, G, D]`."""
    heads, tokens, length = scores.shape
    if normalizer == "sigmoid":
        weights = torch.sigmoid(scores)
        lse = weights.sum(-1).log()
    else:
        lse = scores.logsumexp(-1) if length else scores.new_full((heads, tokens), -math.inf)
        if sink is not None:
            own = _range(0, heads, scores.device)
            with TransformGetItemToIndex():
                lse = torch.logaddexp(lse, torch.vmap(sink)(own).to(lse.dtype)[:, None])
        weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    grouped = weights.view(v.shape[1], heads // v.shape[1] * tokens, length)
    out = torch.matmul(grouped, v.transpose(0, 1)).view(heads, tokens, -1)
    return out.transpose(0, 1), lse.transpose(0, 1)
