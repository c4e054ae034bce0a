"""Attention over one block of keys, as a state `(output, LSE)`, and the exact merging of such states.

With `s = scale * q k^T`, the state of a block is `out = softmax(s) v` and `lse = log(sum(exp(s)))`. Two blocks merge to
`lse = logaddexp(lse_a, lse_b)`, `out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b`: associative and exact, which is
what makes split-KV and shared prefixes possible (Ye et al., 2024, "Cascade Inference"; Dao et al., 2022,
"FlashAttention").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def attention_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `q` over `k`, `v` with its log-sum-exp.

    Args:
        q: `[X, Y, S, D]` queries; X and Y are any two batch dimensions.
        k: `[X, Y, L, D]` keys, any strides (0 too: an expanded head is not copied); `v` likewise.
        scale: factor on the scores.
        causal: query i sees keys 0 to i (needs S = L).
        bias: `[S, L]` added to the scores, -inf where a query may not look; each query must see a key.
        softcap: scores become `softcap * tanh(score / softcap)` before the bias.

    Returns:
        `[X, Y, S, D]` output in q's dtype and `[X, Y, S]` LSE in fp32 (fp64 for fp64 inputs).
    """
    if q.device.type == "cpu" and softcap is None and q.dtype in _CPU_DTYPES and q.dtype == k.dtype:
        mask = None if bias is None else bias.to(q.dtype)[None, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(accumulate), k.to(accumulate).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    if bias is not None:
        scores = scores + bias
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return torch.matmul(weights, v.to(accumulate)).to(q.dtype), lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The state over the keys of both states.

    Args:
        out_a: `[..., D]` output of the first block; `out_b` of the second.
        lse_a: `[...]` its LSE, natural logarithm, -inf for a block without visible keys; `lse_b` likewise.

    Returns:
        Output `[..., D]` in the dtype of `out_a` and LSE `[...]`; two empty states give output 0, LSE -inf.
    """
    # Two empty states give -inf - -inf, whose NaN must not reach the output.
    share = torch.sigmoid(torch.nan_to_num(lse_b - lse_a, nan=0.0, posinf=math.inf, neginf=-math.inf)).unsqueeze(-1)
    wide = share.dtype
    return torch.lerp(out_a.to(wide), out_b.to(wide), share).to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
