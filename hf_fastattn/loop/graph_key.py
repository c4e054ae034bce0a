"""`GraphKey`: which graph of `LoopGraphs` a decode step replays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_fastattn.loop.step_processor import Recorded

if TYPE_CHECKING:
    from hf_fastattn.loop.beam_state import BeamState


@dataclass(frozen=True)
class GraphKey:
    """What the launches of a step depend on.

    Attributes:
        rows: of the step, a bucket.
        do_sample: draw, or take the likeliest.
        penalised: there is a repetition penalty.
        suppressed: end tokens are not chosen at first.
        sharers: rows of the largest prefix group, rounded up to a power of two; 0 where every row reads its own prefix.
        groups: prefix groups that the tensors have entries for in each level, a power of two.
        levels: of prefixes within prefixes; 0 without sharers.
        processors: logits processors that have no kernel, in their order; their parameters are in tensors.
        history: columns of the tensor with the rows' tokens; 0 if no processor reads it.
        adapters: those that rows choose from; None if none are chosen by row.
        beams: the tensors of a beam search; None if tokens are chosen row by row.
        own_params: each row draws by parameters of its own.
        logprobs: the step says how likely each token was.
        forced: columns of the tensor with tokens that rows take whatever is likeliest; 0 if they choose.
        pieces: tokens of prompts that the step computes beside its rows; 0 if there are none.
        short: query heads up to which the rows have few keys in all steps of the call; 0 if they have many.
    """

    rows: int
    do_sample: bool
    penalised: bool
    suppressed: bool
    sharers: int = 0
    groups: int = 0
    levels: int = 0
    processors: tuple[Recorded, ...] = ()
    history: int = 0
    adapters: tuple[str, ...] | None = None
    beams: BeamState | None = None
    own_params: bool = False
    logprobs: bool = False
    forced: int = 0
    pieces: int = 0
    short: int = 0

    def of_beams(self, beams: BeamState) -> GraphKey:
        """The same for a step of a beam search."""
        return replace(self, beams=beams)
