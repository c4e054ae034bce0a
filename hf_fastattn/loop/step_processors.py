"""Logits processors of a recorded step that need no more of a row than how many tokens it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fastattn.kernels.sampling import processors
from hf_fastattn.loop.step_processor import LAST, Now, StepProcessor, mark, put


@dataclass(frozen=True)
class Suppress(StepProcessor):
    """`tokens` are never chosen."""

    tokens: tuple[int, ...]

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        return (torch.zeros(vocabulary, dtype=torch.bool),)

    def write(self, *tensors: Tensor) -> None:
        mark(tensors[0].zero_(), self.tokens, True)

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return processors.suppressed(scores, tensors[0])


@dataclass(frozen=True)
class SuppressAt(StepProcessor):
    """`tokens` are not chosen at step `at`."""

    tokens: tuple[int, ...]
    at: int

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        return torch.zeros(vocabulary, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)

    def write(self, *tensors: Tensor) -> None:
        mark(tensors[0].zero_(), self.tokens, True)
        put(tensors[1], [self.at])

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return processors.suppressed(scores, tensors[0] & (now.step == tensors[1]))


@dataclass(frozen=True)
class ForceFirst(StepProcessor):
    """One of `tokens` is chosen at step `at`, the first one of the row."""

    tokens: tuple[int, ...]
    at: int

    def named(self) -> Sequence[int]:
        return self.tokens

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        return torch.zeros(vocabulary), torch.zeros(1, dtype=torch.int32)

    def write(self, *tensors: Tensor) -> None:
        mark(tensors[0].fill_(-math.inf), self.tokens, 0.0)
        put(tensors[1], [self.at])

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        instead, at = tensors
        return processors.forced(scores, instead, at, now.step)


@dataclass(frozen=True)
class ForceLast(ForceFirst):
    """One of `tokens` is chosen at step `at`, the last one there is room for."""


@dataclass(frozen=True)
class Finite(StepProcessor):
    """NaN becomes 0, and what is infinite the greatest or least number."""

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return scores.nan_to_num(nan=0.0)


@dataclass(frozen=True)
class RaiseEnds(StepProcessor):
    """End tokens `tokens` become likelier after step `start`."""

    tokens: tuple[int, ...]
    start: int
    factor: float

    def named(self) -> Sequence[int]:
        return self.tokens

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        marked = torch.zeros(vocabulary, dtype=torch.bool)
        return marked, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)

    def write(self, *tensors: Tensor) -> None:
        mark(tensors[0].zero_(), self.tokens, True)
        put(tensors[1], [self.start])
        put(tensors[2], [self.factor])

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ends, start, factor = tensors
        return processors.decayed(scores, ends, start, factor, now.step)


@dataclass(frozen=True)
class Normalise(StepProcessor):
    """Scores become logarithms of probabilities; only where the greatest one is taken, since draws are of these anyway."""

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return scores.log_softmax(-1)


@dataclass(frozen=True)
class Typical(StepProcessor):
    """Tokens nearest to the entropy that hold the mass `bound`."""

    place: ClassVar[int] = LAST
    bound: float

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        return (torch.zeros(1),)

    def write(self, *tensors: Tensor) -> None:
        put(tensors[0], [self.bound])

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        # Not before: it imports Triton.
        from hf_fastattn.kernels.sampling import typical

        return typical.typical_scores(scores, tensors[0])


@dataclass(frozen=True)
class Epsilon(Typical):
    """Tokens no less likely than `bound`."""

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return processors.above_epsilon(scores, tensors[0])


@dataclass(frozen=True)
class Eta(Typical):
    """Tokens no less likely than a bound that depends on the entropy, of which `bound` is the highest."""

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        return processors.above_eta(scores, tensors[0])
