"""Whether the patched model computes what stock computes: the check before any figure of speed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import hf_fastattn

STEPS = 8
# Rows of a batch that are compared: the exact model is slow.
ROWS = 2


class Agreement:
    """Compares a model with its patched self; in 16 bits against an fp32 copy, which lives as long as this object.

    Args:
        model: stock, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._exact: Any = None

    def __call__(self, ids: Tensor) -> bool:
        """In fp32: greedy tokens are equal. In 16 bits: logits err at most twice as much as stock's (FlashAttention's
        criterion), over the end of the prompt and STEPS tokens after it.

        Args:
            ids: `[B, S]` prompts.
        """
        if self.model.dtype == torch.float32:
            return self._same_tokens(ids)
        ids = ids[:ROWS]
        more = torch.randint(int(ids.min()), int(ids.max()) + 1, (len(ids), STEPS), device=ids.device)
        both = torch.cat((ids, more), 1)
        if self._exact is None:
            self._exact = copy.deepcopy(self.model).float()
        with torch.no_grad():
            exact = self._exact(both, logits_to_keep=STEPS + 1, use_cache=False).logits
            stock = self.model(both, logits_to_keep=STEPS + 1, use_cache=False).logits.float()
            ours = self._paged(both, ids.shape[1]).float()
        return bool((ours - exact).abs().max() <= 2 * (stock - exact).abs().max())

    def _same_tokens(self, ids: Tensor) -> bool:
        options = {"max_new_tokens": 2 * STEPS, "min_new_tokens": 2 * STEPS, "do_sample": False}
        want = self.model.generate(ids, **options)
        with hf_fastattn.patched(self.model):
            return torch.equal(want, self.model.generate(ids, **options))

    def _paged(self, ids: Tensor, prompt: int) -> Tensor:
        """Logits `[B, STEPS + 1, vocabulary]`: the prompt in one forward, then token by token."""
        with hf_fastattn.patched(self.model):
            cache = hf_fastattn.PagedCache(self.model.config)
            parts = [self.model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
            for column in range(prompt, ids.shape[1]):
                parts.append(self.model(ids[:, column : column + 1], past_key_values=cache, use_cache=True).logits)
            call = hf_fastattn.report(self.model).last_call
            assert call is not None and call.forwards == STEPS + 1 and not call.fallbacks, call
        return torch.cat(parts, 1)
