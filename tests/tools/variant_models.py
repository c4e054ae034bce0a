"""Variants, and stock models whose attention is a plain PyTorch implementation of each, written by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import hf_fastattn
from hf_fastattn import Variant
from tests.tools.models import tiny

HEADS, LONGEST = 4, 256
_generator = torch.Generator().manual_seed(11)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator)


@dataclass(frozen=True)
class Pairs:
    """Queries `[B, H, S, D]`, keys and values `[B, H, L, D]`, positions `[B, 1, S, 1]` and `[B, 1, 1, L]` of one layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_idx: Tensor
    kv_idx: Tensor
    scale: float
    window: int | None = None

    @property
    def scores(self) -> Tensor:
        return self.q @ self.k.transpose(2, 3) * self.scale

    @property
    def causal(self) -> Tensor:
        causal = self.kv_idx <= self.q_idx
        return causal if self.window is None else causal & (self.past < self.window)

    @property
    def past(self) -> Tensor:
        return self.q_idx - self.kv_idx

    def attend(self, scores: Tensor, seen: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        """Softmax attention over keys that are seen, `seen` and causal ones by default, and are no padding."""
        seen = (self.causal if seen is None else seen) & (self.kv_idx >= 0)
        scores = scores.masked_fill(~seen, -1e30)
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
        return torch.softmax(scores, -1)[..., : self.k.shape[2]] @ self.v


@dataclass(frozen=True)
class Case:
    """A variant, and what its plain implementation makes of the pairs of a layer."""

    make: Callable[[], Variant]
    plain: Callable[[Pairs], Tensor]
    shares: bool = True


SLOPES = 2.0 ** -torch.arange(1.0, HEADS + 1)
DISTANCES = 2 * _randn(HEADS, LONGEST)
SINKS = 2 * _randn(HEADS)
DOCUMENTS = torch.arange(LONGEST) // 11
OWN = (torch.arange(64)[:, None] * 3 + torch.arange(LONGEST)) % 7
ANGLES = torch.arange(LONGEST)[:, None] * torch.exp2(-torch.arange(16) % 8)
GAINS = 1.0 + 0.5 * _randn(HEADS, 16)
NEVER_NEGATIVE = LONGEST - 1


def alibi(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + SLOPES[h] * (kv_idx - q_idx)


def distance_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, table: Tensor) -> Tensor:
    return score + table[h, q_idx - kv_idx]


def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def near_or_first(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx < 4) | (q_idx - kv_idx < 16)


def prefix_lm(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (kv_idx <= q_idx) | (kv_idx < 6)


def by_row(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score + OWN[b, kv_idx]


def turned(x: Tensor, h: Tensor, at: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * ANGLES[at].cos() + torch.cat((-x[half:], x[:half])) * ANGLES[at].sin()


def gained(o: Tensor, h: Tensor, q_idx: Tensor) -> Tensor:
    return o * GAINS[h]


def _turned_plain(x: Tensor, at: Tensor) -> Tensor:
    angles = ANGLES[at.clamp(min=0)]
    return x * angles.cos() + torch.cat((-x[..., 8:], x[..., :8]), -1) * angles.sin()


def _turned_pairs(p: Pairs) -> Tensor:
    q, k = _turned_plain(p.q, p.q_idx[..., 0]), _turned_plain(p.k, p.kv_idx[:, :, 0])
    return p.attend(q @ k.transpose(2, 3) * p.scale) * GAINS.view(1, HEADS, 1, 16)


def _by_distance(p: Pairs) -> Tensor:
    return torch.stack([DISTANCES[h][p.past.clamp(0, NEVER_NEGATIVE)][:, 0] for h in range(HEADS)], 1)


def _sigmoid(p: Pairs) -> Tensor:
    weights = torch.sigmoid(p.scores - 3.0) * (p.causal & (p.kv_idx >= 0))
    return weights @ p.v


def _rows(p: Pairs) -> Tensor:
    bias = torch.stack([OWN[row][p.kv_idx[row].clamp(min=0)] for row in range(len(p.q))])
    return p.attend(p.scores + bias)


CASES: dict[str, Case] = {
    "alibi": Case(
        lambda: Variant(score_mod=alibi),
        lambda p: p.attend(p.scores - SLOPES.view(1, -1, 1, 1) * p.past),
    ),
    "alibi, built in": Case(
        lambda: Variant(alibi=SLOPES),
        lambda p: p.attend(p.scores - SLOPES.view(1, -1, 1, 1) * p.past),
    ),
    "distance bias": Case(
        lambda: Variant(score_mod=distance_bias, parameters={"table": DISTANCES}),
        lambda p: p.attend(p.scores + _by_distance(p)),
    ),
    "softcap and sinks": Case(
        lambda: Variant(softcap=4.0, sinks=SINKS),
        lambda p: p.attend(4.0 * torch.tanh(p.scores / 4.0), sinks=SINKS),
    ),
    "documents": Case(
        lambda: Variant(mask_mod=same_document),
        lambda p: p.attend(p.scores, p.causal & (p.q_idx // 11 == p.kv_idx // 11)),
    ),
    "first keys and a window": Case(
        lambda: Variant(mask_mod=near_or_first),
        lambda p: p.attend(p.scores, p.causal & ((p.kv_idx < 4) | (p.past < 16))),
    ),
    "window": Case(
        lambda: Variant(window=20),
        lambda p: p.attend(p.scores, p.causal & (p.past < 20)),
    ),
    "prefix-LM": Case(
        lambda: Variant(mask_mod=prefix_lm, causal=False),
        lambda p: p.attend(p.scores, p.causal | (p.kv_idx < 6)),
    ),
    "transforms": Case(
        lambda: Variant(query_transform=turned, key_transform=turned, output_transform=gained),
        _turned_pairs,
    ),
    "sigmoid": Case(
        lambda: Variant(normalizer="sigmoid", score_mod=lambda score, b, h, q_idx, kv_idx: score - 3.0),
        _sigmoid,
    ),
    "by row": Case(lambda: Variant(score_mod=by_row), _rows, shares=False),
}


def plain_attention(plain: Callable[[Pairs], Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """An attention function for Transformers' interface, of rows that are padded on the left."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        rows, heads, queries, dim = query.shape
        keys, groups = key.shape[2], key.shape[1]
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        starts = torch.zeros(rows, dtype=torch.int64, device=query.device)
        if attention_mask is not None:
            starts = attention_mask[:, 0].any(1).int().argmax(-1)
        places = torch.arange(keys, device=query.device) - starts[:, None]
        scale = options.get("scaling") or 1 / math.sqrt(dim)
        pairs = Pairs(
            query, k, v, places[:, None, keys - queries :, None], places[:, None, None], scale, options.get("sliding_window")
        )
        # Rows of padding attend to nothing, or to whatever a NaN would come from.
        out = plain(pairs) * (pairs.q_idx >= 0)
        return out.transpose(1, 2).contiguous(), None

    return attention


def stock_with(name: str, device: str = "cpu", family: str = "llama", **over: Any) -> Any:
    """A stock model whose attention computes the case."""
    model, known = tiny(family, **over).to(device), f"variant_{sorted(CASES).index(name)}"
    AttentionInterface.register(known, plain_attention(CASES[name].plain))
    AttentionMaskInterface.register(known, sdpa_mask)
    model.set_attn_implementation(known)
    return model


def patched_with(
    name: str, device: str = "cpu", family: str = "llama", options: dict[str, Any] | None = None, **over: Any
) -> Any:
    """A model of the same weights, patched with the case's variant."""
    return hf_fastattn.patch(tiny(family, **over).to(device), variant=CASES[name].make(), **(options or {}))
