"""Score and mask functions as PyTorch's FlexAttention documentation shows them, for 28 heads and 256 positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEADS, LENGTH = 28, 256
_generator = torch.Generator().manual_seed(7)
_bias = torch.randn(HEADS, 2 * LENGTH, generator=_generator)
_slopes = torch.exp2(-(torch.arange(HEADS) + 1) * 8.0 / HEADS)
_head_bias = torch.randn(HEADS, generator=_generator)
_position_bias = torch.randn(LENGTH, generator=_generator)
_document_id = torch.arange(LENGTH) // 21
_prefix_length = torch.tensor([13, 40, 3, 7, 25, 6, 5, 4])
WINDOW, SOFTCAP, WIDTH, KERNEL, DILATION = 24, 3.0, 8, 5, 3


def relative_position(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def relative_bias_table(score, b, h, q_idx, kv_idx):
    return score + _bias[h, q_idx - kv_idx + LENGTH]


def alibi(score, b, h, q_idx, kv_idx):
    return score + _slopes[h] * (kv_idx - q_idx)


def alibi_computed(score, b, h, q_idx, kv_idx):
    scale = torch.exp2(-((h + 1) * 8.0 / HEADS))
    return score + (kv_idx - q_idx) * scale


def softcap(score, b, h, q_idx, kv_idx):
    return SOFTCAP * torch.tanh(score / SOFTCAP)


def head_dependent(score, b, h, q_idx, kv_idx):
    return torch.where(h % 2 == 0, score * 2.0, score + _head_bias[h])


def learned_position_bias(score, b, h, q_idx, kv_idx):
    return score + _position_bias[kv_idx] - 0.5 * _position_bias[q_idx]


def causal_by_score(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, -float("inf"))


def distance_buckets(score, b, h, q_idx, kv_idx):
    """As T5's: exact for near keys, logarithmic for others."""
    distance = torch.clamp(q_idx - kv_idx, min=0)
    far = 8 + (torch.log(distance.clamp(min=1) / 8.0) * 3.0).to(torch.int32)
    return score + _bias[h, torch.where(distance < 8, distance, torch.minimum(far, torch.tensor(31)))]


def softcap_then_alibi(score, b, h, q_idx, kv_idx):
    return alibi(softcap(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def sliding_window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= WINDOW)


def document(b, h, q_idx, kv_idx):
    return (_document_id[q_idx] == _document_id[kv_idx]) & (q_idx >= kv_idx)


def prefix_lm(b, h, q_idx, kv_idx):
    return (kv_idx <= _prefix_length[b]) | (q_idx >= kv_idx)


def chunked(b, h, q_idx, kv_idx):
    return q_idx // 16 == kv_idx // 16


def neighbourhood(b, h, q_idx, kv_idx):
    """A window of 5 x 5 in pictures 8 wide."""
    near_x = ((q_idx % WIDTH) - (kv_idx % WIDTH)).abs() <= KERNEL // 2
    near_y = ((q_idx // WIDTH) - (kv_idx // WIDTH)).abs() <= KERNEL // 2
    return near_x & near_y


def dilated(b, h, q_idx, kv_idx):
    return (q_idx - kv_idx) % DILATION == 0


def block_sparse(b, h, q_idx, kv_idx):
    return ((kv_idx // 16 + h) % 3 == 0) | (q_idx // 16 == kv_idx // 16)


def sinks_and_window(b, h, q_idx, kv_idx):
    return (kv_idx < 4) | (q_idx - kv_idx < WINDOW)


@dataclass(frozen=True)
class Mod:
    """One case: functions, and whether the mask alone decides what is seen."""

    score: object = None
    mask: object = None
    causal: bool = True


MODS = {
    "relative position": Mod(relative_position),
    "relative bias table": Mod(relative_bias_table),
    "alibi": Mod(alibi),
    "alibi, computed": Mod(alibi_computed),
    "softcap": Mod(softcap),
    "head-dependent": Mod(head_dependent),
    "learned position bias": Mod(learned_position_bias),
    "causal by score": Mod(causal_by_score, causal=False),
    "distance buckets": Mod(distance_buckets),
    "softcap, then alibi": Mod(softcap_then_alibi),
    "causal": Mod(mask=causal, causal=False),
    "sliding window": Mod(mask=sliding_window, causal=False),
    "document": Mod(mask=document, causal=False),
    "prefix-LM": Mod(mask=prefix_lm, causal=False),
    "chunked": Mod(mask=chunked),
    "neighbourhood": Mod(mask=neighbourhood),
    "dilated": Mod(mask=dilated),
    "block-sparse": Mod(mask=block_sparse),
    "sinks and window": Mod(mask=sinks_and_window),
    "alibi in documents": Mod(alibi, document, causal=False),
}
