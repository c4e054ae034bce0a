"""`StepProcessor`: a logits processor in a recorded step; its parameters are in static tensors that every call writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# A processor in the key of a graph: its type, and what the shapes of its tensors depend on.
Recorded = tuple[type["StepProcessor"], tuple[int, ...]]
# Where a processor comes: before the repetition penalty, after it, or after temperature, top-k, top-p and min-p.
FIRST, MIDDLE, LAST = range(3)


@dataclass(frozen=True)
class Now:
    """What a step knows of the rows.

    Attributes:
        step: `[1]` int32, new tokens so far.
        length: `[1]` int64, tokens of a row, with the prompt.
        history: `[B, columns]` int32, the tokens themselves; None if no processor asks for them.
    """

    step: Tensor
    length: Tensor
    history: Tensor | None


class StepProcessor:
    """One processor of a call.

    Attributes:
        place: FIRST, MIDDLE or LAST.
    """

    place: ClassVar[int] = MIDDLE

    def named(self) -> Sequence[int]:
        """Tokens that the head must have; where it lacks one, Transformers fails."""
        return ()

    def remembers(self) -> bool:
        """Whether it reads the tokens of the rows."""
        return False

    def sizes(self) -> tuple[int, ...]:
        """What its launches depend on, beside the vocabulary: sizes of its tensors."""
        return ()

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        """Tensors of the shapes that `write` wants, on the current device."""
        return ()

    def write(self, *tensors: Tensor) -> None:
        """Write the call's parameters."""

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        """The processed scores, `[B, V]` fp32; launches only."""
        raise AssertionError("every processor has its own")


def put(target: Tensor, values: Sequence[float] | Sequence[Sequence[int]]) -> None:
    """Write all of `target`; from pageable memory this does not wait for the device."""
    target.copy_(torch.tensor(values, dtype=target.dtype, device="cpu"), non_blocking=True)


def mark(target: Tensor, tokens: Sequence[int], value: float) -> None:
    """Write `value` at `tokens`; those outside of `target` are passed over."""
    there = [token for token in tokens if 0 <= token < len(target)]
    index = torch.tensor(there, dtype=torch.int64, device="cpu").to(target.device, non_blocking=True)
    target.index_fill_(0, index, value)
