"""Whether the patched model computes what stock computes: the check before any figure of speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import hf_fastattn
from hf_fastattn.eval.accuracy.verdict import FLOOR_EPS, MAXIMUM_FACTOR
from hf_fastattn.eval.models import in_precision, truth_dtype
from hf_fastattn.transformers_version import CACHE

STEPS = 8
# The exact model is slow: rows that it computes, and tokens of all of them together.
ROWS, EXACT_TOKENS = 2, 8192


@dataclass(frozen=True)
class Verdict:
    """Whether the two agree, and in which figures."""

    agrees: bool
    detail: str


@dataclass(frozen=True)
class Agreement:
    """Compares a model with its patched self, both against the same weights in a wider dtype.

    Three checks. The logits of a prefill and of STEPS - 1 forwards after it err at most twice as much as stock's, in the
    same pieces or in one forward (FlashAttention's criterion; in fp32 also four roundings are no error). Every token that
    `generate()` itself chose, in whatever loop it ran, is among the exact model's likeliest (the first; with sampling the
    first `top_k`) but for what such errors can exchange. In fp32, greedy tokens are those of stock.

    Args:
        stock: the model, in eval mode, on its device.
        ours: the same weights (the same tensors, or copies), not patched now.
        options: of `hf_fastattn.patch`.
    """

    stock: Any
    ours: Any
    options: Mapping[str, Any]

    def __call__(self, ids: Tensor, arguments: Callable[[], dict[str, Any]]) -> Verdict:
        """Check one call.

        Args:
            ids: `[B, S]` prompts without padding.
            arguments: options of `generate()`; called anew for each call, since callbacks may keep a state.
        """
        prompt, options = ids.shape[1], arguments()
        top = options.get("top_k", 1) if options.get("do_sample") else 1
        tokens = self._generated(ids, arguments)
        rows = [0, len(tokens) - 1][: max(1, min(ROWS, len(tokens), EXACT_TOKENS // prompt))]
        chosen = tokens[rows]
        read, targets = chosen[:, :-1], chosen[:, prompt:, None]
        with torch.no_grad(), in_precision(self.stock, truth_dtype(self.stock.dtype)):
            exact = self._whole(read)
        with torch.no_grad():
            pieces = _in_pieces(self.stock, read, prompt, DynamicCache(config=self.stock.config))
            theirs = max(_error(self._whole(read), exact), _error(pieces, exact))
            ours = _error(self._paged(read, prompt), exact)
        floor = FLOOR_EPS * exact.abs().max().item() if self.stock.dtype == torch.float32 else 0.0
        allowed = MAXIMUM_FACTOR * theirs + floor
        least = exact.topk(min(top, exact.shape[-1]), dim=-1).values[..., -1:]
        # Of two logits each may be off by what is allowed.
        regret = (least - exact.gather(-1, targets)).max().item()
        same = top > 1 or self.stock.dtype != torch.float32 or self._same_as_stock(ids, arguments, tokens)
        detail = f"logits err {ours:.3g} (allowed {allowed:.3g}), tokens miss the top {top} by {max(regret, 0.0):.3g}"
        if not same:
            detail += ", greedy tokens are not stock's"
        return Verdict(ours <= allowed and regret <= 2 * allowed and same, detail)

    def _generated(self, ids: Tensor, arguments: Callable[[], dict[str, Any]]) -> Tensor:
        with hf_fastattn.patched(self.ours, **self.options):
            torch.manual_seed(0)
            tokens: Tensor = self.ours.generate(ids, max_new_tokens=STEPS, **arguments())
        return tokens

    def _same_as_stock(self, ids: Tensor, arguments: Callable[[], dict[str, Any]], tokens: Tensor) -> bool:
        return torch.equal(self.stock.generate(ids, max_new_tokens=STEPS, **arguments()), tokens)

    def _whole(self, ids: Tensor) -> Tensor:
        """Stock's logits `[B, STEPS, vocabulary]` of the last tokens, in one forward."""
        logits: Tensor = self.stock(ids, logits_to_keep=STEPS, use_cache=False).logits
        return logits

    def _paged(self, ids: Tensor, prompt: int) -> Tensor:
        with hf_fastattn.patched(self.ours, **self.options):
            logits = _in_pieces(self.ours, ids, prompt, hf_fastattn.PagedCache(self.ours.config))
            call = hf_fastattn.report(self.ours).last_call
            assert call is not None and call.forwards == STEPS and not call.fallbacks, call
        return logits


def _in_pieces(model: Any, ids: Tensor, prompt: int, cache: Any) -> Tensor:
    """Logits `[B, STEPS, vocabulary]`: the prompt in one forward, then token by token."""
    parts = [model(ids[:, :prompt], **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits]
    for column in range(prompt, ids.shape[1]):
        parts.append(model(ids[:, column : column + 1], **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(parts, 1)


def _error(logits: Tensor, exact: Tensor) -> float:
    return (logits.to(exact.dtype) - exact).abs().max().item()
