"""`ProcessorState`: what logits processors of a recorded step keep on the device: parameters, and the tokens of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.loop.step_processor import Now, Recorded, StepProcessor

# Fewest columns of the rows' tokens: longer rows need a new tensor, and steps that read the old one are captured again.
MIN_COLUMNS = 1024


class ProcessorState:
    """Static tensors of logits processors for up to `rows` rows.

    Args:
        device: of the model.
        rows: there is room for.
        vocabulary: size of the logits.
    """

    def __init__(self, device: torch.device, rows: int, vocabulary: int) -> None:
        self._device, self._rows, self._vocabulary = device, rows, vocabulary
        # By type and sizes: what a graph reads stays where it is, and a call writes what it has of these.
        self._parameters: dict[Recorded, tuple[Tensor, ...]] = {}
        self._prompt = torch.zeros(1, dtype=torch.int64, device=device)
        self._history: Tensor | None = None

    def begin(self, given: Sequence[StepProcessor], input_ids: Tensor, new: int) -> int:
        """A call starts, with nothing in flight: write what its processors read.

        Args:
            input_ids: `[B, S]` the prompt.
            new: new tokens a row, at most.

        Returns:
            Columns of the rows' tokens; 0 if no processor reads them.
        """
        for one in given:
            one.write(*self._tensors((type(one), one.sizes())))
        self._prompt.fill_(input_ids.shape[1])
        if not any(one.remembers() for one in given):
            return 0
        columns = input_ids.shape[1] + new
        if self._history is None or self._history.shape[1] < columns:
            with torch.inference_mode(False):
                size = (self._rows, max(power_of_2(columns), MIN_COLUMNS))
                self._history = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._history[: input_ids.shape[0], : input_ids.shape[1]].copy_(input_ids)
        return self._history.shape[1]

    def apply(self, chain: Sequence[Recorded], place: int, scores: Tensor, step: Tensor) -> Tensor:
        """The scores `[B, V]` after those of the processors that come at `place`.

        Args:
            step: `[1]`, new tokens so far.
        """
        chain = [recorded for recorded in chain if recorded[0].place == place]
        if not chain:
            return scores
        # As in Transformers' loop, scores are fp32 from here on.
        scores = scores.float()
        now = Now(step, self._prompt + step, None if self._history is None else self._history[: len(scores)])
        for kind, sizes in chain:
            scores = kind.apply(scores, now, sizes, *self._tensors((kind, sizes)))
        return scores

    def note(self, tokens: Tensor, step: Tensor) -> None:
        """Add `tokens [B, 1]` to the rows; `step [1]` counts them already."""
        assert self._history is not None
        column = (self._prompt + step - 1).expand(tokens.shape)
        self._history[: len(tokens)].scatter_(1, column, tokens.int())

    def follow(self, rows: Tensor) -> None:
        """The rows hold other tokens now, `[B, columns]`, of which those that count are among the first."""
        assert self._history is not None
        columns = min(rows.shape[1], self._history.shape[1])
        self._history[: len(rows), :columns].copy_(rows[:, :columns])

    def keep(self, index: Tensor) -> None:
        """Row b becomes row `index[b]`."""
        if self._history is not None:
            self._history[: len(index)] = self._history.index_select(0, index)

    def _tensors(self, recorded: Recorded) -> tuple[Tensor, ...]:
        if recorded not in self._parameters:
            kind, sizes = recorded
            with torch.inference_mode(False), self._device:
                self._parameters[recorded] = kind.tensors(sizes, self._vocabulary)
        return self._parameters[recorded]
