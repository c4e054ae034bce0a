"""`continuations.continuations` in plain PyTorch, and the same for scores that logits processors have changed."""

from __future__ import annotations

import torch
from torch import Tensor

# A row is looked through in as many parts, if they can be of equal length: PyTorch sorts few long lines, and selects in
# many short ones.
PARTS = (16, 8, 4, 2, 1)


def continuations(logits: Tensor, so_far: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Scores and tokens among which are those of the `kept` best tokens of every row."""
    return best_of_parts(logits.float().log_softmax(-1), so_far, kept)


def best_of_parts(log_probs: Tensor, so_far: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The same from logarithms of probabilities `[B, V]` fp32."""
    rows, vocab = log_probs.shape
    parts = next(count for count in PARTS if vocab % count == 0)
    length = vocab // parts
    scores = (log_probs + so_far[:, None]).view(rows * parts, length)
    best, places = torch.topk(scores, min(kept, length))
    firsts = torch.arange(0, vocab, length, device=log_probs.device)[None, :, None]
    tokens = places.view(rows, parts, -1) + firsts
    return best.view(rows, -1), tokens.view(rows, -1)
