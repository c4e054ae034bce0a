"""Logits processors as parts of a recorded step: each with its parameters in static tensors, written when a call starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.kernels.sampling import processors

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


def _put(target: Tensor, values: Sequence[float] | Sequence[Sequence[int]]) -> None:
    """Write all of `target`; from pageable memory this does not wait for the device."""
    target.copy_(torch.tensor(values, dtype=target.dtype, device="cpu"), non_blocking=True)


def _mark(target: Tensor, tokens: Sequence[int], value: float) -> None:
    """Write `value` at `tokens`; those outside of `target` are passed over."""
    there = [token for token in tokens if 0 <= token < len(target)]
    index = torch.tensor(there, dtype=torch.int64, device="cpu").to(target.device, non_blocking=True)
    target.index_fill_(0, index, value)


@dataclass(frozen=True)
class Suppress(StepProcessor):
    """`tokens` are never chosen."""

    tokens: tuple[int, ...]

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        return (torch.zeros(vocabulary, dtype=torch.bool),)

    def write(self, *tensors: Tensor) -> None:
        _mark(tensors[0].zero_(), self.tokens, True)

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
        _mark(tensors[0].zero_(), self.tokens, True)
        _put(tensors[1], [self.at])

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
        _mark(tensors[0].fill_(-math.inf), self.tokens, 0.0)
        _put(tensors[1], [self.at])

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
        _mark(tensors[0].zero_(), self.tokens, True)
        _put(tensors[1], [self.start])
        _put(tensors[2], [self.factor])

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ends, start, factor = tensors
        return processors.decayed(scores, ends, start, factor, now.step)


@dataclass(frozen=True)
class Bias(StepProcessor):
    """A bias on tokens, and on the last tokens of sequences whose others have come.

    Attributes:
        sequences: none is empty.
        biases: one for each.
        with_last: a row must have as many tokens as the sequence; else as many as those before its last.
    """

    place: ClassVar[int] = FIRST
    sequences: tuple[tuple[int, ...], ...]
    biases: tuple[float, ...]
    with_last: bool

    def named(self) -> Sequence[int]:
        return [token for sequence in self.sequences for token in sequence]

    def remembers(self) -> bool:
        return self.sizes()[0] > 0

    def sizes(self) -> tuple[int, ...]:
        lengths = [len(sequence) for sequence in self.sequences if len(sequence) > 1]
        return (power_of_2(len(lengths)), power_of_2(max(lengths) - 1)) if lengths else (0, 0)

    @staticmethod
    def tensors(sizes: tuple[int, ...], vocabulary: int) -> tuple[Tensor, ...]:
        count, longest = sizes
        lasts, needs = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        prefixes = torch.zeros(count, longest, dtype=torch.int32)
        return torch.zeros(vocabulary), prefixes, lasts, torch.zeros(count), needs

    def write(self, *tensors: Tensor) -> None:
        singles, prefixes, lasts, biases, needs = tensors
        count, longest = self.sizes()
        alone = {tokens[0]: bias for tokens, bias in zip(self.sequences, self.biases, strict=True) if len(tokens) == 1}
        index = torch.tensor(list(alone), dtype=torch.int64, device="cpu").to(singles.device, non_blocking=True)
        values = torch.tensor(list(alone.values()), dtype=torch.float32, device="cpu")
        singles.zero_().index_copy_(0, index, values.to(singles.device, non_blocking=True))
        longer = [pair for pair in zip(self.sequences, self.biases, strict=True) if len(pair[0]) > 1]
        # What fills the tensors up matches rows, and adds nothing.
        longer += [((-1, 0), 0.0)] * (count - len(longer))
        if longer:
            _put(prefixes, [[-1] * (longest + 1 - len(tokens)) + list(tokens[:-1]) for tokens, _ in longer])
            _put(lasts, [tokens[-1] for tokens, _ in longer])
            _put(biases, [bias for _, bias in longer])
            _put(needs, [len(tokens) - (not self.with_last) for tokens, _ in longer])

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        singles, prefixes, lasts, biases, needs = tensors
        return processors.biased(scores, singles, prefixes, lasts, biases, needs, now.history, now.length)


@dataclass(frozen=True)
class BadWords(Bias):
    """Sequences that are not to be completed: a bias of -inf, after the repetition penalty."""

    place: ClassVar[int] = MIDDLE


@dataclass(frozen=True)
class NoRepeats(StepProcessor):
    """No sequence of `size` tokens comes twice."""

    size: int

    def remembers(self) -> bool:
        return True

    def sizes(self) -> tuple[int, ...]:
        return (self.size,)

    @staticmethod
    def apply(scores: Tensor, now: Now, sizes: tuple[int, ...], *tensors: Tensor) -> Tensor:
        assert now.history is not None
        return processors.without_repeats(scores, sizes[0], now.history, now.length)


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
        _put(tensors[0], [self.bound])

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
