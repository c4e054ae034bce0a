"""[qk-norm] + RoPE + append to the pages: the steps between the projections and attention, as one operation.

RoPE (Su et al., 2021) in the rotate-half form on the first `cos.shape[-1]` dimensions:
`x * cos + rotate_half(x) * sin`, from the model's own cos and sin, so every RoPE scaling of Transformers is supported.
The products are rounded in the dtype of x, as Transformers rounds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.kernels.layer.reference import rms_norm
from hf_fastattn.kernels.page_formats import is_eight_bits, write_tokens

# Tokens of a forward up to which queries and keys are rotated together.
FEW_TOKENS = 64


def signed_sin(sin: Tensor) -> Tensor:
    """`sin` with its first half negated, so that `rotate_half(x) * sin = roll(x, D/2) * signed_sin(sin)`."""
    half = sin.shape[-1] // 2
    return torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


def tables(
    frequencies: Tensor, position_ids: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """cos, sin and `signed_sin` of positions `[B, S]`, `[B, S, rotary dims]` each; see `rope_tables.rope_tables`."""
    angles = position_ids[..., None].float() * frequencies.float()
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
    return cos, sin, signed_sin(sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on `x: [T, heads, D]` with `cos`, and `sin` from `signed_sin`, both `[T, rotary dims]`."""
    dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if dim == x.shape[-1]:
        return x * cos + x.roll(dim // 2, -1) * sin
    turned = x[..., :dim]
    return torch.cat((turned * cos + turned.roll(dim // 2, -1) * sin, x[..., dim:]), dim=-1)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> Tensor:
    """Normalise and rotate q and k, and write k and v into their pages.

    Args:
        q: `[T, H, D]` queries, before norm and RoPE.
        k: `[T, G, D]` keys, likewise; `v` the values, stored as they are.
        cos: `[T, rotary dims]`; `sin` likewise, with its sign folded in by `signed_sin`.
        k_pages: `[N, P, G, D]` pages of keys, written in place; `v_pages` of values. For those of 8 bits
            they are quantised.
        slot_mapping: `[T]` int64, `page * P + offset` of each token.
        q_norm: `[D]` weight of the RMSNorm on queries, if the model has one; `k_norm` on keys.
        eps: of that norm.
        unit_offset: the norm multiplies by `1 + weight`; see `rms_norm` for the rounding.

    Returns:
        `[T, H, D]` rotated queries.
    """
    # Under autocast norms, cos and sin are fp32 and heads 16-bit: the rotated heads are rounded back.
    narrow = q.dtype
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps, unit_offset)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps, unit_offset)
    if len(q) <= FEW_TOKENS:
        # A step is waiting for launches: one rotation costs less than two, with a copy before it.
        heads, both = q.shape[1], rotate(torch.cat((q, k), 1), cos, sin)
        q, k = both[:, :heads], both[:, heads:]
    else:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if is_eight_bits(k_pages):
        write_tokens(k_pages, v_pages, slot_mapping, k, v)
    else:
        k_pages.flatten(0, 1).index_copy_(0, slot_mapping, k.to(k_pages.dtype))
        v_pages.flatten(0, 1).index_copy_(0, slot_mapping, v)
    return q.to(narrow)
