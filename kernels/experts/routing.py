"""`Routing`: which experts the tokens of a forward go to, with which weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """What a router decided, all on the device.

    Attributes:
        chosen: `[T, K]` int32, the experts of each token, all different, the likeliest first.
        weights: `[T, K]` fp32, what the outputs of these experts are multiplied by.
        distinct: `[up to T * K]` int32, every expert that a token of several chose, each once; None for one token, and
            where `counts` serves more tokens.
        distinct_count: `[1]` int32, how many of `distinct` there are.
        counts: `[E]` int32, pairs of a token and an expert, by expert; None for few tokens.
        ranks: `[T, K]` int32, a number for each pair of one expert, from 0 on without a gap.
        gate: `[T]` fp32, the logit that gates a shared expert, if there is one.
    """

    chosen: Tensor
    weights: Tensor
    distinct: Tensor | None = None
    distinct_count: Tensor | None = None
    counts: Tensor | None = None
    ranks: Tensor | None = None
    gate: Tensor | None = None
