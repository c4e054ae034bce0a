"""Transformers' own attention, for calls that our kernels do not take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa

# Options with which attention is more than a softmax over what the mask shows.
NOT_PLAIN = frozenset(("softcap", "s_aux", "output_attentions", "position_bias", "cache"))


@dataclass(frozen=True)
class OneLaunch:
    """A call of PyTorch's attention without a mask, as `sdpa_attention_forward` makes it of plain causal attention.

    Further layers make it without looking again at what is the same for all of them: of the host's time for attention,
    Transformers' function takes a third.

    Attributes:
        queries: the shape of queries; `keys` that of keys.
        shared: whether several query heads share keys.
    """

    queries: torch.Size
    keys: torch.Size
    shared: bool

    @classmethod
    def of(cls, module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> OneLaunch | None:
        """The call for one query, or as many as keys; None where Transformers does more, or an option asks for more."""
        shared = getattr(module, "num_key_value_groups", 1) > 1
        if not NOT_PLAIN.isdisjoint(kwargs) or query.shape[2] not in (1, key.shape[2]):
            return None
        if shared and not use_gqa_in_sdpa(None, key, value):
            return None
        return cls(query.shape, key.shape, shared)

    def fits(self, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether another layer's call is the same but for the tensors."""
        return query.shape == self.queries and key.shape == self.keys and NOT_PLAIN.isdisjoint(kwargs)

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """`[B, S, H, D]`."""
        causal = False
        if self.queries[2] > 1:
            given = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if given is None else given
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=kwargs.get("dropout", 0.0), is_causal=causal, scale=kwargs.get("scaling"),
            enable_gqa=self.shared,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous()


def stock_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """`sdpa_attention_forward`; what it would refuse or leave out (softcap, sinks, weights) is computed in steps.

    Args:
        query: `[B, H, S, D]`; `key` and `value` are `[B, G, L, D]`.
        mask: `[B, 1 or H, S, L]`, bool or added to the scores; None as for `sdpa_attention_forward`.
        kwargs: what the model gave its attention function.

    Returns:
        Output `[B, S, H, D]`, and the weights `[B, H, S, L]` if `output_attentions` is set.
    """
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None and not kwargs.get("output_attentions"):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return _in_steps(module, query, key, value, mask, **kwargs)


def _in_steps(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """As the eager attention of Gemma 2 and GPT-OSS: softmax in fp32, all else in the model's dtype."""
    rows, heads, queries, dim = query.shape
    groups, ratio = key.shape[1], heads // key.shape[1]
    # A single query: those of the R heads that share keys take the place of R queries, and no key is repeated.
    packed = queries == 1 and ratio > 1
    if packed:
        query = query.reshape(rows, groups, ratio, dim)
        mask, position_bias = _packed(mask, groups), _packed(position_bias, groups)
    else:
        key, value = repeat_kv(key, ratio), repeat_kv(value, ratio)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and queries > 1:
        mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        sink = (
            s_aux.view((1, groups, ratio, 1) if packed else (1, heads, 1, 1)).expand(*scores.shape[:3], 1).to(scores.dtype)
        )
        scores = torch.cat((scores, sink), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, p=dropout)
    out = torch.matmul(weights, value).reshape(rows, heads, queries, -1).transpose(1, 2).contiguous()
    return out, weights.reshape(rows, heads, queries, -1) if output_attentions else None


def _packed(scores: Tensor | None, groups: int) -> Tensor | None:
    """`[B, H, 1, L]`, one for each head, as `[B, G, R, L]`; for all heads together as it is."""
    if scores is None or scores.shape[1] == 1:
        return scores
    return scores.reshape(scores.shape[0], groups, -1, scores.shape[-1])
