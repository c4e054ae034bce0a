"""Transformers' rarer logits processors in plain PyTorch, written so that a step with them can be recorded as a CUDA graph.

All shapes are fixed and nothing waits for the device: what differs from call to call is in tensors, a list of tokens in
one over the vocabulary, and what happens at one step compares the step. Numbers are filled in (`masked_fill`), since
`torch.where` may copy them from the host. `scores` are `[B, V]` fp32 and stay as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def suppressed(scores: Tensor, tokens: Tensor) -> Tensor:
    """-inf for `tokens`, `[V]` bool or something that broadcasts like it."""
    return scores.masked_fill(tokens, -math.inf)


def forced(scores: Tensor, instead: Tensor, at: Tensor, step: Tensor) -> Tensor:
    """The scores `instead` `[V]` at step `at`, all `[1]`."""
    return torch.where(step == at, instead, scores)


def decayed(scores: Tensor, ends: Tensor, start: Tensor, factor: Tensor, step: Tensor) -> Tensor:
    """End tokens rise: by `|score| * (factor ** (step - start) - 1)` after step `start`.

    Args:
        ends: `[V]` bool.
        start: `[1]`, an integer.
        factor: `[1]` fp64, as Python computes the power.
        step: `[1]`, new tokens so far.
    """
    late = (step - start).clamp(min=0)
    growth = (torch.pow(factor, late) - 1).float()
    rises = ends & scores.isfinite() & (late > 0)
    return scores + (scores.abs() * growth).masked_fill(~rises, 0.0)


def kept_scores(logits: Tensor, temperature: Tensor, thresholds: Tensor) -> Tensor:
    """fp32 scores of fp32 `temperature [1]`, -inf where they are below the `thresholds [B]` that `sample_tokens` writes."""
    scores = logits.float() * temperature.clamp(1e-30, 1e30).reciprocal()
    return scores.masked_fill(~(scores >= thresholds[:, None]), -math.inf)


def above_epsilon(scores: Tensor, epsilon: Tensor) -> Tensor:
    """-inf for tokens less likely than `epsilon [1]`, but for the likeliest."""
    return _above(scores, epsilon)


def above_eta(scores: Tensor, epsilon: Tensor) -> Tensor:
    """The same with a bound that falls as the entropy grows (Hewitt et al., 2022); `epsilon [1]` is the highest."""
    logs = scores.log_softmax(-1)
    entropy = -(logs.clamp(min=torch.finfo(logs.dtype).min) * logs.exp()).sum(-1, keepdim=True)
    return _above(scores, torch.minimum(epsilon, epsilon.sqrt() * torch.exp(-entropy)))


def _above(scores: Tensor, bound: Tensor) -> Tensor:
    drops = (scores.softmax(-1) < bound) & (scores < scores.amax(-1, keepdim=True))
    return scores.masked_fill(drops, -math.inf)


def biased(
    scores: Tensor, singles: Tensor, prefixes: Tensor, lasts: Tensor, biases: Tensor, needs: Tensor,
    history: Tensor | None, length: Tensor,
) -> Tensor:  # fmt: skip
    """A bias on single tokens, and on the last token of sequences whose other tokens have just come.

    Args:
        singles: `[V]` fp32.
        prefixes: `[S, M]` the sequences without their last tokens, aligned on the right, -1 where shorter.
        lasts: `[S]` int64 last tokens.
        biases: `[S]` fp32.
        needs: `[S]` how long a row must be.
        history: `[B, columns]`, the rows' tokens; not read if there are no sequences.
        length: `[1]` int64, how many of its columns count.
    """
    if not len(lasts):
        return scores + singles
    assert history is not None
    matches = (length >= needs).expand(len(scores), -1)  # [B, S]
    for place in range(prefixes.shape[1]):
        column = (length - prefixes.shape[1] + place).clamp(min=0)
        wanted = prefixes[:, place]
        matches = matches & ((history.index_select(1, column) == wanted) | (wanted < 0))
    total = singles.expand_as(scores).clone()
    return scores + total.index_add_(1, lasts, biases.expand_as(matches).masked_fill(~matches, 0.0))


def without_repeats(scores: Tensor, size: int, history: Tensor, length: Tensor) -> Tensor:
    """-inf for tokens that would complete a sequence of `size` tokens that the row holds already.

    Args:
        history: `[B, columns]`, the rows' tokens.
        length: `[1]` int64, how many of its columns count.
    """
    rows, vocab = scores.shape
    windows = history.shape[1] - size + 1
    matches = (torch.arange(windows, device=history.device) + size <= length).expand(rows, -1)
    for place in range(size - 1):
        column = (length + 1 - size + place).clamp(min=0)
        matches = matches & (history[:, place : place + windows] == history.index_select(1, column))
    # Windows that do not match write to a spare column, as do tokens that the head does not have.
    tokens = history[:, size - 1 :].clamp(max=vocab).masked_fill(~matches, vocab).long()
    banned = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=scores.device).scatter_(1, tokens, True)
    return scores.masked_fill(banned[:, :vocab], -math.inf)
