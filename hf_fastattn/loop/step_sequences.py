"""Logits processors of a recorded step that look at the tokens of the rows: biased and forbidden sequences, and repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.kernels.sampling import processors
from hf_fastattn.loop.step_processor import FIRST, MIDDLE, Now, StepProcessor, put


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
            put(prefixes, [[-1] * (longest + 1 - len(tokens)) + list(tokens[:-1]) for tokens, _ in longer])
            put(lasts, [tokens[-1] for tokens, _ in longer])
            put(biases, [bias for _, bias in longer])
            put(needs, [len(tokens) - (not self.with_last) for tokens, _ in longer])

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
