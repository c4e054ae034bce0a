"""`ForcedState`: what recorded steps read and write where tokens are forced, in tensors that stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.kernels.sampling.loop_tensors import LoopTensors

# Fewest columns: longer calls need new tensors, and steps that read the old ones are captured again.
MIN_COLUMNS = 64


class ForcedState:
    """Tokens that rows are to take, and what steps say of them.

    Args:
        device: of the choice.
        rows: there is room for.
        columns: new tokens that there is room for.

    Attributes:
        tokens: `[rows, columns + 1]` int64, by the row's number in the call; the last column belongs to no step.
        choices: the same, int64: what steps would have taken; -1 where none was taken.
        logprobs: the same, fp32: of the forced tokens; NaN where none was taken.
    """

    def __init__(self, device: torch.device, rows: int, columns: int) -> None:
        self.columns = max(power_of_2(columns), MIN_COLUMNS)
        with torch.inference_mode(False):
            self.tokens = torch.zeros(rows, self.columns + 1, dtype=torch.int64, device=device)
            self.choices = torch.zeros_like(self.tokens)
            self.logprobs = torch.zeros(self.tokens.shape, dtype=torch.float32, device=device)

    def write(self, tokens: Tensor) -> None:
        """A call starts: `tokens [B, N]` on the host."""
        rows, count = tokens.shape
        self.tokens[:rows, :count].copy_(tokens, non_blocking=True)
        # Of steps that rows do not take.
        self.choices.fill_(-1)
        self.logprobs.fill_(torch.nan)

    def places(self, tensors: LoopTensors, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of each row's next token; rows that take no part have the last column. Launches only.

        Args:
            numbers: `[rows]` int32, the rows' numbers in the call.
        """
        rows = numbers.shape[0]
        column = torch.where(tensors.finished[:rows] == 0, tensors.step.long(), self.columns)
        return numbers.long(), column
