"""Errors of logits and hidden states against the exact ones, by window, and where the first of them is too large."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.eval.accuracy.verdict import FLOOR_EPS, MAXIMUM_FACTOR
from hf_fastattn.eval.accuracy.windows import WindowBatch

FIGURES = (
    *("tokens", "entries", "absolute", "squares", "max", "kl", "kl_max"),
    *("agree", "regret", "largest", "exact_squares"),
)


def layer_errors(states: Tensor, exact: Tensor) -> Tensor:
    """`|h - exact| / |exact|` (2-norms) of each token in each layer, fp64 on the host; 0 for padding.

    Args:
        states: `[layers, B, S, hidden]`; `exact` likewise.
    """
    found = []
    for ours, true in zip(states, exact, strict=True):
        size = true.double().norm(dim=-1)
        found.append(torch.where(size > 0, (ours.double() - true.double()).norm(dim=-1) / size.clamp(min=1e-300), 0.0))
    return torch.stack(found).cpu()


def logit_errors(logits: Tensor, exact: Tensor, batch: WindowBatch) -> dict[str, list[float]]:
    """Errors over each window's scored tokens, a list of one figure a window.

    Args:
        logits: `[B, K, V]` of the last K columns; `exact` likewise.

    Returns:
        tokens, entries (tokens * V); sums over them of |error|, error^2, exact^2 and KL(exact || ours); the largest
        |error|, KL, |exact logit| and regret (what the exact logits lose by our top choice); tokens whose top choice agrees.
    """
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for row, window in enumerate(batch.windows):
        ours, true = logits[row, -window.scored :].double(), exact[row, -window.scored :].double()
        figures = row_errors(ours, true)
        for name in FIGURES:
            found[name].append(figures[name])
    return found


def row_errors(ours: Tensor, true: Tensor) -> dict[str, float]:
    """The figures of `logit_errors` for one row of logits `[K, V]` in fp64."""
    error = ours - true
    log_true = torch.log_softmax(true, -1)
    kl = (log_true.exp() * (log_true - torch.log_softmax(ours, -1))).sum(-1)
    choice = ours.argmax(-1, keepdim=True)
    regret = true.amax(-1) - true.gather(1, choice)[:, 0]
    return {
        "tokens": len(ours),
        "entries": error.numel(),
        "absolute": error.abs().sum().item(),
        "squares": error.square().sum().item(),
        "max": error.abs().max().item(),
        "kl": kl.sum().item(),
        "kl_max": kl.max().item(),
        "agree": (regret == 0).sum().item(),
        "regret": regret.max().item(),
        "largest": true.abs().max().item(),
        "exact_squares": true.square().sum().item(),
    }


def first_beyond(errors: Tensor, bounds: Tensor, batch: WindowBatch) -> dict[str, Any] | None:
    """The first layer with a token off by more than the limit, and the first such token in it; None if there is none.

    Args:
        errors: `[layers, B, S]` relative errors.
        bounds: `[layers]` stock's largest; the limit is twice that and a floor.
    """
    limits = MAXIMUM_FACTOR * bounds + FLOOR_EPS
    beyond = ~(errors <= limits[:, None, None])
    if not bool(beyond.any()):
        return None
    layer = int(beyond.any(2).any(1).nonzero()[0])
    column = int(beyond[layer].any(0).nonzero()[0])
    row = int(beyond[layer, :, column].nonzero()[0])
    return {
        "layer": layer,
        "row": row,
        "column": column,
        "position": int(batch.positions[row, column]),
        "token": int(batch.ids[row, column]),
        "error": errors[layer, row, column].item(),
        "limit": limits[layer].item(),
    }
