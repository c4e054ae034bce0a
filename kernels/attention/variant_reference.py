"""Paged attention with a `Variant` in plain PyTorch: its functions as they are, for all pairs at once by `torch.vmap`.

`s = score_mod(softcap(scale * q k^T) + alibi)`, -inf where causality, the window or `mask_mod` hides the key; then
`softmax(s) v`, with the heads' sinks in the sum, or `sigmoid(s) v`. The oracle of the Triton kernels, and what a CPU runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn import functional

from hf_fastattn.kernels.attention.decode_reads import Run
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.page_formats import dequantised, is_eight_bits
from hf_fastattn.kernels.variants.rotation import RotaryFrequencies
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
    if is_eight_bits(k_pages):
        k_pages, v_pages = dequantised(k_pages, v_pages, q.dtype, plan.pages_read)
    bounds, keys, values = plan.cu_seqlens_q, k_pages.flatten(0, 1), v_pages.flatten(0, 1)
    window = min((w for w in (plan.window, variant.window) if w is not None), default=None)
    parts = []
    for first, last in _batches(plan, q.shape[1]):
        rows = _Rows.of(range(first, last), keys, values, plan, functions.get("key_transform"), q.dtype)
        parts.append(_attended(q[bounds[first] : bounds[last]], rows, window, variant, functions, scale))
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


@dataclass(frozen=True)
class _Rows:
    """Some rows of a batch, gathered: S queries of all of them, and each one's keys, L of the longest.

    Attributes:
        first: the number of the first row.
        counts: queries a row.
        q_idx: `[S]` their positions.
        b: `[S]` their rows.
        keys: `[L_b, G, D]` of each row, transformed; `values` likewise.
        kv_idx: `[rows, L]` positions of keys; behind a row's own ones the last again, which no query sees.
    """

    first: int
    counts: list[int]
    q_idx: Tensor
    b: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    kv_idx: Tensor

    @staticmethod
    def of(rows: range, keys: Tensor, values: Tensor, plan: ReadPlan, transform: Any, dtype: torch.dtype) -> _Rows:
        runs, counts = [plan.rows[row] for row in rows], [plan.query_lens[row] for row in rows]
        device, lengths = keys.device, [run.length for run in runs]
        positions = [_range(run.start, run.start + run.length, device) for run in runs]
        q_idx = torch.cat([_range(plan.seq_lens[row] - plan.query_lens[row], plan.seq_lens[row], device) for row in rows])
        b = torch.repeat_interleave(_range(rows.start, rows.stop, device), torch.tensor(counts, device=device))
        slots = [plan.slots_of(run, device) if run.first_slot is None else _slots(run) for run in runs]
        wide = torch.promote_types(dtype, torch.float32)
        k = _transformed(transform, torch.cat([keys[place] for place in slots]).to(wide), torch.cat(positions))
        kv_idx = torch.stack([_padded(place, max(lengths)) for place in positions])
        own_values = [values[place].to(wide) for place in slots]
        return _Rows(rows.start, counts, q_idx, b, k.to(dtype).to(wide).split(lengths), own_values, kv_idx)

    def split(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        """A block of queries by rows: several rows are computed at once, a long one block by block."""
        return x.split(self.counts, dim) if len(self.counts) > 1 else (x,)

    def scores(self, query: Tensor, scale: float) -> Tensor:
        """`[H, S, L]` of queries `[S, H, D]`."""
        longest = self.kv_idx.shape[1]
        found = [_scores(q, k, scale) for q, k in zip(self.split(query, 0), self.keys, strict=True)]
        return torch.cat([functional.pad(scores, (0, longest - scores.shape[2])) for scores in found], 1)

    def seen(self) -> Tensor:
        """`[rows, L]`, which keys are there."""
        lengths = torch.tensor([len(k) for k in self.keys], device=self.kv_idx.device)
        return torch.arange(self.kv_idx.shape[1], device=self.kv_idx.device) < lengths[:, None]


def _attended(
    q: Tensor, rows: _Rows, window: int | None, variant: Variant, functions: dict[str, Callable[..., Any]], scale: float
) -> tuple[Tensor, Tensor]:
    """The queries `[S, H, D]` of some rows, each over its keys."""
    heads, longest, there = q.shape[1], rows.kv_idx.shape[1], rows.seen()
    wide = torch.promote_types(q.dtype, torch.float32)
    query = _transformed(functions.get("query_transform"), q.to(wide), rows.q_idx).to(q.dtype).to(wide)
    # More scores than at once only of a single row.
    step = max(MOST_SCORES // max(heads * longest, 1), 1) if len(rows.counts) == 1 else max(len(q), 1)
    parts = []
    for lo in range(0, len(q), step):
        block = slice(lo, lo + step)
        b, q_idx = rows.b[block], rows.q_idx[block]
        own = (b - rows.first).long()
        scores = rows.scores(query[block], scale)
        scores = _modified(scores, b, q_idx, rows.kv_idx[own], there[own], window, variant.causal, functions)
        for of_row, v in zip(rows.split(scores, 1), rows.values, strict=True):
            parts.append(_weighted(of_row[..., : len(v)], v, variant.sinks, variant.normalizer))
    if not parts:
        return q, q.new_zeros(0, heads, dtype=torch.float32)
    out = _transformed(functions.get("output_transform"), torch.cat([out for out, _ in parts]), rows.q_idx)
    return out.to(q.dtype), torch.cat([lse for _, lse in parts]).float()


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
    if isinstance(function, RotaryFrequencies):
        # All vectors at once, at a tenth of the time.
        return function(x, h, positions[:, None])
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
