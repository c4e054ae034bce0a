"""Which numbers a model's draws were made by: uniform on (0, 1), if they follow the distribution that stock draws from.

Of a drawn token the distribution function among tokens in the order of their probabilities is known: between the sum of
all likelier ones and that sum with its own. A number drawn uniformly between the two is uniform on (0, 1), and
independent of those of the tokens before, if and only if the token was drawn from that distribution (Rosenblatt, 1952;
for discrete ones Smith, 1985). The distribution is stock's: its logits in one forward over all tokens, in the model's
dtype, and Transformers' own logits processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from hf_fastattn.eval.accuracy.independence import Numbers

# Rows of one forward of stock.
ROWS = 64


@dataclass(frozen=True)
class Draws:
    """What is known of drawn tokens `[N, T]`.

    Attributes:
        numbers: that they were drawn by; NaN after an end token.
        repeats: whether a token was there before it was drawn, less the chance of that; and its variance.
        impossible: tokens that stock would never have drawn.
    """

    numbers: Numbers
    repeats: Numbers
    variances: Numbers
    impossible: int


@torch.no_grad()
def numbers_of(model: Any, sequences: Tensor, prompt: int, options: dict[str, Any], generator: torch.Generator) -> Draws:
    """The draws of the `T` tokens after a prompt.

    Args:
        model: not patched.
        sequences: `[N, prompt + T]` tokens without padding in front; after an end token numbers are NaN.
        prompt: tokens of the prompt.
        options: of `generate()`, which the tokens were drawn with.
        generator: of the numbers between two sums, on the host.
    """
    ends = options.get("eos_token_id") or []
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    processors = model._get_logits_processor(config, input_ids_seq_length=prompt, device=model.device)
    new = sequences.shape[1] - prompt
    drawn = torch.rand(len(sequences), new, generator=generator, dtype=torch.float64, device="cpu")
    found, repeats, variances = (np.full((len(sequences), new), np.nan) for _ in range(3))
    impossible = 0
    for first in range(0, len(sequences), ROWS):
        rows = sequences[first : first + ROWS].to(model.device)
        logits = model(rows[:, :-1], use_cache=False, logits_to_keep=new).logits
        open_rows = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for step in range(new):
            scores = processors(rows[:, : prompt + step], logits[:, step].float())
            chances = torch.softmax(scores.double(), -1)
            token = rows[:, prompt + step, None]
            own = chances.gather(1, token)
            likelier = torch.where(chances > own, chances, 0.0).sum(1, keepdim=True)
            number = (likelier + own * drawn[first : first + ROWS, step, None].to(own.device)).clamp(max=1.0)[:, 0]
            impossible += int(((own[:, 0] == 0) & open_rows).sum())
            known = torch.zeros_like(chances).scatter_(1, rows[:, : prompt + step], 1.0)
            chance = (chances * known).sum(1)
            here = slice(first, first + ROWS)
            repeated = known.gather(1, token)[:, 0] - chance
            for table, values in ((found, number), (repeats, repeated), (variances, chance * (1 - chance))):
                table[here, step] = torch.where(open_rows, values, torch.nan).cpu().numpy()
            open_rows &= ~torch.isin(token[:, 0], torch.tensor(ends, dtype=token.dtype, device=token.device))
    return Draws(found, repeats, variances, impossible)
