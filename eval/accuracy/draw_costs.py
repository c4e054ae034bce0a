"""Whether drawn tokens follow the exact distribution, by what they cost.

Given what came before, a token that is drawn from `p` costs `-log p(token)`, whose mean is the entropy `H(p)` and whose
variance is that of `log p` under `p`. The differences from the means do not depend on each other on average, so their sum
over the root of the summed variances is standard normal (the central limit theorem for martingales).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.eval.accuracy.verdict import Check

# One of 100,000 sound runs is beyond it.
MOST_DEVIATIONS = 4.42


def draw_figures(exact: Tensor, tokens: Tensor, top_k: int) -> dict[str, float]:
    """Sums over drawn tokens.

    Args:
        exact: `[.., V]` logits.
        tokens: `[..]` drawn at temperature 1 from the `top_k` likeliest, or from all if it is 0.

    Returns:
        tokens; surprise, the sum of costs over their means; variance; `outside`, by how much the exact logit of a token
        falls short of those that may be drawn, at most.
    """
    logits, drawn = exact.reshape(-1, exact.shape[-1]).double(), tokens.reshape(-1, 1).to(exact.device)
    least = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), -1).values[:, -1:]
    short = (least - logits.gather(1, drawn))[:, 0]
    likely = logits.masked_fill(logits < least, -torch.inf).log_softmax(-1)
    weights = likely.exp()
    finite = likely.masked_fill(weights == 0, 0.0)
    mean = (weights * finite).sum(-1)
    variance = (weights * finite.square()).sum(-1) - mean.square()
    cost = mean - likely.gather(1, drawn)[:, 0]
    inside = short <= 0
    return {
        "tokens": len(drawn),
        "surprise": float(cost[inside].sum()),
        "variance": float(variance[inside].sum()),
        "outside": max(float(short.max()), 0.0),
    }


def draw_checks(variant: str, figures: list[dict[str, Any]], allowed: float) -> list[Check]:
    """Checks of one variant over all its figures.

    Args:
        allowed: by how much a logit may be off; two of them may exchange their places.
    """
    tokens = sum(part["tokens"] for part in figures)
    variance = sum(part["variance"] for part in figures)
    deviations = abs(sum(part["surprise"] for part in figures)) / max(variance, 1e-300) ** 0.5
    outside = max(part["outside"] for part in figures)
    return [
        Check(variant, "drawn tokens, cost, standard errors from its mean", deviations, MOST_DEVIATIONS, f"{tokens} tokens"),
        Check(variant, "drawn tokens, largest distance below those allowed", outside, 2 * allowed),
    ]
