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
# Scores at a time, so that they stay in a core's own cache from one operation to the next; but so many queries at least.
BLOCK_SCORES, LEAST_QUERIES = 2**18, 16


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
        bias: `[S, L]`, or `[X, 1, 1, L]` for all queries of X, added to the scores; -inf where a query may not look. Each
            query must see a key.
        softcap: scores become `softcap * tanh(score / softcap)` before the bias.

    Returns:
        `[X, Y, S, D]` output in q's dtype and `[X, Y, S]` LSE in fp32 (fp64 for fp64 inputs).
    """
    if q.device.type == "cpu" and softcap is None and q.dtype in _CPU_DTYPES and q.dtype == k.dtype:
        mask = None if bias is None else bias.to(q.dtype).expand(1, 1, -1, -1) if bias.ndim == 2 else bias.to(q.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    narrow, queries, tokens = q.dtype, q.shape[-2], k.shape[-2]
    wide = torch.promote_types(narrow, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    step = max(BLOCK_SCORES // max(q.shape[0] * q.shape[1] * tokens, 1), LEAST_QUERIES)
    step = step if q.device.type == "cpu" else max(queries, 1)
    blocks = [
        _block_state(q[:, :, lo : lo + step], k, v, lo, scale, causal, _of_queries(bias, lo, lo + step), softcap)
        for lo in range(0, max(queries, 1), step)
    ]
    out, lse = blocks[0] if len(blocks) == 1 else (torch.cat(parts, 2) for parts in zip(*blocks, strict=True))
    return out.to(narrow), lse


def _block_state(
    q: Tensor, k: Tensor, v: Tensor, first: int, scale: float, causal: bool, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The state of the queries from the one of position `first` on, in the dtype of all of them."""
    if causal:
        last = first + q.shape[2]
        k, v = k[:, :, :last], v[:, :, :last]
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale if softcap is None else scale / softcap)
    if softcap is not None:
        scores = scores.tanh_() * softcap
    if causal and q.shape[2] > 1:
        future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores[..., first:].masked_fill_(future, -math.inf)
    if bias is not None:
        scores += bias[..., : scores.shape[3]]
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), v), lse


def _of_queries(bias: Tensor | None, first: int, last: int) -> Tensor | None:
    return bias if bias is None or bias.shape[-2] == 1 else bias[..., first:last, :]


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
