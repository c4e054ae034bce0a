"""`ForcedTokens`: a logits processor that says what every row is to generate, and notes how likely that was.

In the device's loop the recorded step itself reads the tokens and computes their log-probabilities, so that teacher forcing
runs on the path that greedy search runs on. Elsewhere, in Transformers' own loop of a patched or a stock model, the
processor does the same by its scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class ForcedTokens(LogitsProcessor):
    """For one greedy `generate()` call, given as `logits_processor=LogitsProcessorList([ForcedTokens(tokens)])`.

    Args:
        tokens: `[B, N]` int64, what the rows are to generate.
        ends: end tokens of the call, with the first of which a row is over.

    Attributes:
        logprobs: `[B, N]` fp32 on the host: of each forced token by the softmax of the scores that the other processors have
            left; NaN for steps that a row did not take.
        choices: `[B, N]` int64 on the host: the likeliest tokens, which the steps would have taken; -1 likewise.

    Raises:
        TypeError: `tokens` is no int64 tensor.
        ValueError: it is not `[B, N]`, is empty, or holds negative numbers.
    """

    def __init__(self, tokens: Tensor, ends: Sequence[int] = ()) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be an int64 tensor, got {getattr(tokens, 'dtype', type(tokens).__name__)}")
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens must be [rows, new tokens], got {list(tokens.shape)}")
        self.tokens = tokens.detach().cpu().contiguous()
        if int(self.tokens.min()) < 0:
            raise ValueError(f"tokens must not be negative, got {int(self.tokens.min())}")
        self.largest = int(self.tokens.max())
        ended = torch.isin(self.tokens, torch.tensor(list(ends), dtype=torch.int64)).long()
        self._over = ended.cumsum(1) - ended > 0
        self._forget()

    def _forget(self) -> None:
        self.logprobs = torch.full(self.tokens.shape, torch.nan, dtype=torch.float32)
        self.choices = torch.full(self.tokens.shape, -1, dtype=torch.int64)
        self._prompt: int | None = None

    def why_not(self, rows: int, most_new: int, do_sample: bool) -> str | None:
        """Why a recorded step cannot force them in a call of so many rows and new tokens; None if it can."""
        if do_sample:
            return "tokens are forced and drawn: give do_sample=False"
        if self.tokens.shape[0] != rows or self.tokens.shape[1] < most_new:
            return f"{list(self.tokens.shape)} forced tokens for {rows} rows of {most_new} new tokens"
        return None

    def note(self, logprobs: Tensor, choices: Tensor) -> None:
        """Keep what a loop has computed, `[B, steps]` each, as in the attributes."""
        self._forget()
        steps = logprobs.shape[1]
        over = self._over[:, :steps]
        self.logprobs[:, :steps] = logprobs.cpu().masked_fill(over, torch.nan)
        self.choices[:, :steps] = choices.cpu().masked_fill(over, -1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave the forced tokens alone.

        Raises:
            ValueError: the call has other rows than `tokens`, or asks for more.
        """
        if self._prompt is None or input_ids.shape[1] < self._prompt:
            self._forget()
            self._prompt = input_ids.shape[1]
        step = input_ids.shape[1] - self._prompt
        if len(scores) != len(self.tokens) or step >= self.tokens.shape[1]:
            raise ValueError(
                f"tokens are {list(self.tokens.shape)}, and the call asks for token {step + 1} of {len(scores)} rows; give "
                "[rows, max_new_tokens], one call an object"
            )
        forced = self.tokens[:, step : step + 1].to(scores.device)
        likely = scores.float().log_softmax(-1).gather(1, forced)[:, 0].cpu()
        self.logprobs[:, step] = likely.masked_fill(self._over[:, step], torch.nan)
        self.choices[:, step] = scores.argmax(-1).cpu().masked_fill(self._over[:, step], -1)
        return torch.full_like(scores, float("-inf")).scatter(1, forced, 0.0)
