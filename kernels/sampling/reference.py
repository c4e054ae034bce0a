"""Token choice in plain PyTorch: what Transformers' processors and warpers compute, written out.

`scores` are logits times `1 / temperature`, fp32 unless the logits are fp64. Divisions by a parameter are products with its
reciprocal, which may differ from PyTorch in the last bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_fastattn.kernels.sampling.params import SamplingParams


def process_logits(logits: Tensor, params: SamplingParams, seen: Tensor | None, eos: list[int], step: int) -> Tensor:
    """fp32 logits `[B, V]` with the penalty on tokens where `seen` is nonzero and, before `min_new_tokens`, eos at -inf.

    As in Transformers, an end token outside of the vocabulary is none of the scores'.
    """
    x = logits.float()
    if seen is not None:
        penalty = torch.tensor(params.repetition_penalty, dtype=torch.float32, device=x.device)
        x = torch.where(seen != 0, torch.where(x < 0, x * penalty, x * penalty.reciprocal()), x)
    if step < params.min_new_tokens:
        inside = [token for token in eos if 0 <= token < x.shape[1]]
        x = x.index_fill(1, torch.tensor(inside, device=x.device, dtype=torch.int64), -math.inf)
    return x


def scaled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Scores: fp32 logits times the reciprocal of the temperature, one for all rows or `[B, 1]`."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    return x * torch.as_tensor(temperature, dtype=x.dtype, device=x.device).reciprocal()


def kept_tokens(logits: Tensor, params: SamplingParams | Tensor) -> Tensor:
    """Which tokens are kept by temperature, top-k, top-p and min-p, `[B, V]` bool.

    Top-p and min-p are computed in fp64. Unlike in Transformers, tokens that tie are kept or dropped together.
    `params` may be `[B, PARAMS]`, each row's own.
    """
    temperature, top_k, top_p, min_p = _columns(params, logits.device)
    scores = scaled(logits, temperature)
    rows, vocab = scores.shape
    ordered = torch.sort(scores, descending=True).values
    kept = torch.ones_like(scores, dtype=torch.bool)
    limited = (top_k > 0) & (top_k < vocab)
    if limited.any():
        last = torch.where(limited, top_k, vocab).long() - 1
        kept &= (scores >= ordered.gather(-1, last.expand(rows, 1))) | ~limited
    if (top_p < 1).any():
        left = ordered.double().masked_fill(ordered < scores.masked_fill(~kept, math.inf).amin(-1, keepdim=True), -math.inf)
        mass = left.softmax(-1)
        # The first of a run of equal scores: its cumulative mass is that of all strictly likelier tokens.
        likelier = mass.cumsum(-1) - mass
        first = torch.searchsorted(-ordered, -ordered)
        ok = (likelier.gather(-1, first) < top_p) | (ordered == ordered[:, :1])
        kept &= (scores >= ordered.masked_fill(~ok, math.inf).amin(-1, keepdim=True)) | (top_p >= 1)
    if (min_p > 0).any():
        kept &= ((scores.double() - ordered[:, :1].double()).exp() >= min_p) | (min_p <= 0)
    return kept


def _columns(params: SamplingParams | Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Temperature, top-k, top-p and min-p, `[B, 1]` fp64, or `[1, 1]` for all rows."""
    table = params if isinstance(params, Tensor) else torch.tensor([params.values()], dtype=torch.float64)
    return table.to(device, torch.float64)[:, :4, None].unbind(1)


def typical_scores(scores: Tensor, mass: Tensor) -> Tensor:
    """fp32 scores, -inf for what typical sampling drops: what is not among the tokens nearest to the entropy of `mass`."""
    logs = scores.log_softmax(-1)
    likely = logs.exp()
    entropy = -torch.where(likely > 0, logs * likely, 0.0).sum(-1, keepdim=True)
    distances = (-logs - entropy).abs()
    ordered, order = distances.sort(-1)
    last = (likely.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    return scores.masked_fill(distances > ordered.gather(-1, last), -math.inf)


def probabilities(logits: Tensor, params: SamplingParams | Tensor) -> Tensor:
    """The probabilities that a token is drawn with, `[B, V]` fp64; `params` as of `kept_tokens`."""
    scores = scaled(logits, _columns(params, logits.device)[0]).double()
    return scores.masked_fill(~kept_tokens(logits, params), -math.inf).softmax(-1)


def token_logprobs(logits: Tensor, tokens: Tensor, params: SamplingParams | Tensor | None = None) -> Tensor:
    """Logarithms of the probabilities that `tokens [B]` are chosen with, `[B]` fp32; without `params` of the softmax."""
    logs = logits.float().log_softmax(-1) if params is None else probabilities(logits, params).log()
    return logs.gather(-1, tokens[:, None])[:, 0].float()


def greedy_tokens(logits: Tensor) -> Tensor:
    """The lowest token of greatest logit of every row, `[B]` int64; NaN counts as -inf."""
    x = logits.float()
    x = torch.where(x.isnan(), -math.inf, x)
    return (x == x.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
