"""Which numbers a model's draws were made by: uniform on (0, 1), if they follow the distribution that stock draws from.

Of a drawn token the distribution function among tokens in the order of their probabilities is known: between the sum of
all likelier ones and that sum with its own. A number drawn uniformly between the two is uniform on (0, 1), and
independent of those of the tokens before, if and only if the token was drawn from that distribution (Rosenblatt, 1952;
for discrete ones Smith, 1985). The distribution is stock's: its logits in one forward over all tokens, in the model's
dtype, and Transformers' own logits processors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from hf_fastattn.eval.accuracy.independence import Numbers

# Rows of one forward of stock.
ROWS = 64


@torch.no_grad()
def numbers_of(
    model: Any, sequences: Tensor, prompt: int, options: dict[str, Any], generator: torch.Generator
) -> tuple[Numbers, int]:
    """The numbers `[N, T]` of the `T` tokens after a prompt, and how many tokens stock would never have drawn.

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
    found = np.full((len(sequences), new), np.nan)
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
            found[first : first + ROWS, step] = torch.where(open_rows, number, torch.nan).cpu().numpy()
            open_rows &= ~torch.isin(token[:, 0], torch.tensor(ends, dtype=token.dtype, device=token.device))
    return found, impossible
