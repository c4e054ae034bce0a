"""`GraphKey`: what tells one captured step of the fast loop from another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GraphKey:
    """What the launches of a step depend on.

    Attributes:
        rows: of the step, a bucket.
        do_sample: draw, or take the likeliest.
        penalised: there is a repetition penalty.
        suppressed: end tokens are not chosen at first.
        sharers: rows of the largest group that shares a prompt, about; a power of two, 0 where all rows read theirs.
        groups: of rows, that there is room for; a power of two.
    """

    rows: int
    do_sample: bool
    penalised: bool
    suppressed: bool
    sharers: int = 0
    groups: int = 0
