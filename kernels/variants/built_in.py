"""Variants that others have written before, ready to use: each function gives a `Variant`.

Tensors are read where they lie, so give them on the model's device; changes in place are seen. Positions past the end of a
table are those of tokens that are generated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_fastattn.kernels.variants.variant import Variant


def sliding_window(window: int) -> Variant:
    """A query sees `window` keys, itself included (Beltagy et al., 2020, "Longformer")."""
    return Variant(window=window)


def softcap(cap: float) -> Variant:
    """Scores become `cap * tanh(score / cap)` (Gemma 2)."""
    return Variant(softcap=cap)


def alibi(slopes: Tensor) -> Variant:
    """`slopes[h] * (kv_idx - q_idx)` is added to scores (Press et al., 2022).

    Args:
        slopes: `[H]`, see `alibi_slopes`.
    """
    return Variant(alibi=slopes)


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """`[heads]`: the slopes of Press et al., also where the number of heads is no power of 2."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (head + 1) / whole) for head in range(whole)]
    slopes += [2 ** (-4 * (2 * head + 1) / whole) for head in range(heads - whole)]
    return torch.tensor(slopes, device=device)


def sinks(scores: Tensor) -> Variant:
    """A score a head that takes part in the softmax and has no value (gpt-oss).

    Args:
        scores: `[H]`.
    """
    return Variant(sinks=scores)


def sinks_and_window(first: int, window: int) -> Variant:
    """A query sees the first keys and those of a window (Xiao et al., 2024, "StreamingLLM").

    Args:
        first: keys at the beginning that all queries see.
        window: last keys that a query sees, itself included.
    """
    _check_positive(first=first, window=window)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < first) | (q_idx - kv_idx < window)

    return Variant(mask_mod=mask)


def chunked(chunk: int) -> Variant:
    """A query sees the keys before it in its own chunk of `chunk` positions (Llama 4)."""
    _check_positive(chunk=chunk)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx // chunk == kv_idx // chunk

    return Variant(mask_mod=mask)


def prefix_lm(prefix: int | Tensor) -> Variant:
    """All queries see the keys of the prefix, before and after them (Raffel et al., 2020).

    Args:
        prefix: keys of the prefix, or `[B]`, those of each row.
    """

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < (prefix[b] if isinstance(prefix, Tensor) else prefix)) | (kv_idx <= q_idx)

    return Variant(mask_mod=mask, causal=False)


def bidirectional_spans(spans: Tensor) -> Variant:
    """Queries see all keys of their own span, and those before them (images in Gemma 3).

    Args:
        spans: `[L]` or `[B, L]` integers, the number of each position's span, 0 outside of spans.
    """
    _check_numbers("spans", spans)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        span = _looked_up(spans, b, q_idx)
        inside = (span > 0) & (q_idx < spans.shape[-1]) & (kv_idx < spans.shape[-1])
        return (kv_idx <= q_idx) | (inside & (span == _looked_up(spans, b, kv_idx)))

    return Variant(mask_mod=mask, causal=False)


def documents(numbers: Tensor) -> Variant:
    """A query sees the keys before it in its own document; what is generated belongs to the last one.

    Args:
        numbers: `[L]` or `[B, L]` integers, the number of each position's document.
    """
    _check_numbers("numbers", numbers)

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return _looked_up(numbers, b, q_idx) == _looked_up(numbers, b, kv_idx)

    return Variant(mask_mod=mask)


def sigmoid(bias: float) -> Variant:
    """Weights are `sigmoid(score + bias)`, not normalised (Ramapuram et al., 2024; there `bias` is `-log(L)`)."""

    def score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + bias

    return Variant(score_mod=score, normalizer="sigmoid")


def dilated(dilation: int, window: int | None = None) -> Variant:
    """A query sees each `dilation`-th key before it.

    Args:
        window: keys seen, itself included; all by default.
    """
    _check_positive(dilation=dilation, **({} if window is None else {"window": window}))

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx - kv_idx) % dilation == 0

    return Variant(mask_mod=mask, window=None if window is None else (window - 1) * dilation + 1)


def block_sparse(blocks: Tensor, size: int) -> Variant:
    """Which blocks of keys each block of queries sees, besides causality.

    Args:
        blocks: bools `[query blocks, key blocks]` or `[H, query blocks, key blocks]`; the last of them go on.
        size: positions of a block.
    """
    _check_positive(size=size)
    if blocks.dtype != torch.bool or blocks.ndim not in (2, 3):
        raise ValueError(
            f"blocks is {blocks.dtype} of shape {tuple(blocks.shape)}, expected bools [query blocks, key blocks], "
            "or these for each head"
        )

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own = blocks[h] if blocks.ndim == 3 else blocks
        row = (q_idx // size).clamp(max=own.shape[0] - 1)
        return own[row, (kv_idx // size).clamp(max=own.shape[1] - 1)]

    return Variant(mask_mod=mask)


def draft_tree(parents: Tensor, starts: Tensor) -> Variant:
    """Drafts that branch: each token of a tree sees the tokens before the tree, its ancestors and itself.

    Args:
        parents: `[S]` integers on the host: the place of each token's parent in the tree, before its own; -1 for none.
        starts: `[B]` integers, the position of each row's first token of the tree; of a row without one, past its end.
    """
    places = parents.tolist()
    seen = torch.eye(len(places), dtype=torch.bool)
    for place, parent in enumerate(places):
        if not -1 <= parent < place:
            raise ValueError(f"parents[{place}]={parent} must be a place before {place}, or -1")
        if parent >= 0:
            seen[place] |= seen[parent]
    ancestors, last = seen.to(starts.device), len(places) - 1

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        query, key = q_idx - starts[b], kv_idx - starts[b]
        return (key < 0) | ancestors[query.clamp(0, last), key.clamp(0, last)]

    return Variant(mask_mod=mask)


def _looked_up(table: Tensor, b: Tensor, position: Tensor) -> Tensor:
    """The entry of a position in a table of all rows or of row `b`; the last one past its end."""
    place = position.clamp(max=table.shape[-1] - 1)
    return table[place] if table.ndim == 1 else table[b, place]


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")


def _check_numbers(name: str, table: Tensor) -> None:
    if table.ndim not in (1, 2) or table.is_floating_point() or table.dtype == torch.bool:
        raise ValueError(f"{name} is {table.dtype} of shape {tuple(table.shape)}, expected integers, [L] or [B, L]")
