"""[qk-norm] + RoPE + append of a single row's new token by the programs that attend to it: decode without a launch ahead.

Each program of `decode_row.py` rotates its queries by itself. The one of a kv head that has the last keys also rotates the
new key, writes it with its value to their slot, which no program reads, and begins its online softmax with them. All
arithmetic is fp32; queries and keys are rounded to the dtype of the pages once they are rotated, as `append.py` does. The
plain PyTorch versions are `rope_reference.rope_append` and `reference.paged_attention`. One row of 2,048 keys of Qwen3-0.6B
takes 0.721 ms a token so, where two launches take 0.741 (H200); with several rows nothing was gained, and with 16 of
Llama-3-8B 4% lost: append overlaps with the launches around it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.attention.tile import empty_state


class NewToken(NamedTuple):
    """What decode appends to a row, before norm and RoPE.

    Attributes:
        k: `[1, G, D]` key, any strides but 1 in the last dimension; `v` the value, stored as it is.
        cos: `[1, rotary dims]`; `sin` likewise, with its sign folded in by `rope_reference.signed_sin`.
        slot_mapping: `[1]` int32, `page * P + offset` of the token; if negative, it is not written.
        q_norm: `[D]` weight of the RMSNorm on queries, if the model has one; `k_norm` on keys.
        eps: of that norm.
        unit_offset: the norm multiplies by `1 + weight`.
        settled: no launch that may still be running writes the row's length, so it is read before the launch ahead has
            ended. Launches overlap, so the one before the last counts too.
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    slot_mapping: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6
    unit_offset: bool = False
    settled: bool = False

    def for_kernel(self) -> tuple[Any, ...]:
        """As kernels take it: tensors, eps and strides; what is known when they are compiled is `constants`."""
        strides = (self.k.stride(1), self.v.stride(1))
        # Without norms something stands in their place, which is not read: Triton takes no None in a tuple.
        norms = (self.k, self.k) if self.q_norm is None else (self.q_norm, self.k_norm)
        return (self.k, self.v, self.cos, self.sin, self.slot_mapping, *norms, self.eps, strides)

    @property
    def constants(self) -> tuple[int, bool, bool, bool]:
        """Rotary dims, `unit_offset`, `settled`, and whether there are norms."""
        return self.cos.shape[-1], self.unit_offset, self.settled, self.q_norm is not None


def new_options(new: NewToken | None) -> dict[str, Any]:
    """The kernel's arguments for a new token, or for none."""
    if new is None:
        return {"new_token": None, "NEW": (0, False, False, False)}
    return {"new_token": new.for_kernel(), "NEW": new.constants}


def check_new_token(q: Tensor, k_pages: Tensor, new: NewToken) -> None:
    """Raise a `ValueError` unless a new token fits queries `q: [1, H, D]` and pages `[N, P, G, D]`."""
    rows, _, dim = q.shape
    shape, rotary = (rows, k_pages.shape[2], dim), new.cos.shape[-1]
    if (new.q_norm is None) != (new.k_norm is None):
        raise ValueError("q_norm and k_norm: expected both or none")
    if new.k.shape != shape or new.v.shape != shape:
        raise ValueError(f"k {tuple(new.k.shape)} and v {tuple(new.v.shape)} must be [1, G, D] = {shape}")
    if rotary > dim or rotary % 2 or new.cos.shape != (rows, rotary) or new.sin.shape != new.cos.shape:
        raise ValueError(
            f"cos {tuple(new.cos.shape)} and sin {tuple(new.sin.shape)} must be [1, rotary dims], an even number up to {dim}"
        )


def takes_new_token(q: Tensor, k_pages: Tensor) -> bool:
    """Whether decode can append to these pages: of 8 bits they have scales, and fp32 has products of its own."""
    return q.element_size() == 2 and k_pages.dtype is q.dtype


@triton.jit
def with_partners(x_ptr, D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_D]` elements as they are, 0 from column D on, and those that RoPE rotates into each of them."""
    d = tl.arange(0, BLOCK_D)
    HALF: tl.constexpr = ROTARY // 2
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    return tl.load(x_ptr + d, mask=d < D, other=0.0), tl.load(x_ptr + partner, mask=d < ROTARY, other=0.0)


@triton.jit
def angles_of(cos_ptr, sin_ptr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin of the token, `[BLOCK_D]` each."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(cos_ptr + d, mask=d < ROTARY, other=0.0), tl.load(sin_ptr + d, mask=d < ROTARY, other=0.0)


@triton.jit
def rotated_head(
    raw, norm, angles, eps, D: tl.constexpr, ROTARY: tl.constexpr, NORMS: tl.constexpr, UNIT_OFFSET: tl.constexpr
):  # fmt: skip
    """A head, normalised and rotated: `[BLOCK_D]`, fp32; all but eps are pairs of what `with_partners` gives."""
    x = raw[0].to(tl.float32)
    y = raw[1].to(tl.float32)
    if NORMS:
        inverse = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        first = norm[0].to(tl.float32)
        second = norm[1].to(tl.float32)
        if UNIT_OFFSET:
            first += 1.0
            second += 1.0
        x = x * inverse * first
        y = y * inverse * second
    if ROTARY > 0:
        # The sign of rotate_half is folded into sin.
        turned = x * angles[0].to(tl.float32) + y * angles[1].to(tl.float32)
        x = tl.where(tl.arange(0, x.shape[0]) < ROTARY, turned, x)
    return x


@triton.jit
def new_queries(q_ptr, off_q, ok_m, new, D: tl.constexpr, BLOCK_D: tl.constexpr, NEW: tl.constexpr):
    """The query heads at `off_q: [BLOCK_M]`, normalised and rotated: `[BLOCK_M, BLOCK_D]` in the dtype of q."""
    _, _, cos_ptr, sin_ptr, _, norm_ptr, _, eps, strides = new
    ROTARY: tl.constexpr = NEW[0]
    HALF: tl.constexpr = ROTARY // 2
    d = tl.arange(0, BLOCK_D)
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    row_ptr = q_ptr + off_q[:, None]
    raw = tl.load(row_ptr + d[None, :], mask=ok_m[:, None] & (d < D)[None, :], other=0.0)
    x = raw.to(tl.float32)
    y = x
    if ROTARY > 0:
        y = tl.load(row_ptr + partner[None, :], mask=ok_m[:, None] & (d < ROTARY)[None, :], other=0.0).to(tl.float32)
    if NEW[3]:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        first, second = with_partners(norm_ptr, D, ROTARY, BLOCK_D)
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        if NEW[1]:
            first += 1.0
            second += 1.0
        x = x * inverse * first[None, :]
        y = y * inverse * second[None, :]
    if ROTARY > 0:
        cos, sin = angles_of(cos_ptr, sin_ptr, ROTARY, BLOCK_D)
        turned = x * cos.to(tl.float32)[None, :] + y * sin.to(tl.float32)[None, :]
        x = tl.where((d < ROTARY)[None, :], turned, x)
    return x.to(raw.dtype)


@triton.jit
def append_and_begin(
    q, head, length, k_pages_ptr, v_pages_ptr, head_offset, stride_page, stride_slot, scale, new,
    D: tl.constexpr, PAGE: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """The state of `q: [BLOCK_M, BLOCK_D]` after the new token, which goes to its slot, of kv head `head`."""
    k_ptr, v_ptr, cos_ptr, sin_ptr, slot_ptr, _, norm_ptr, eps, strides = new
    stride_kh, stride_vh = strides
    ROTARY: tl.constexpr = NEW[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    NORMS: tl.constexpr = NEW[3]
    d = tl.arange(0, BLOCK_D)
    norm = ()
    if NORMS:
        norm = with_partners(norm_ptr, D, ROTARY, BLOCK_D)
    angles = ()
    if ROTARY > 0:
        angles = angles_of(cos_ptr, sin_ptr, ROTARY, BLOCK_D)
    raw = with_partners(k_ptr + head * stride_kh, D, ROTARY, BLOCK_D)
    key = rotated_head(raw, norm, angles, eps, D, ROTARY, NORMS, NEW[1]).to(q.dtype)
    value = tl.load(v_ptr + head * stride_vh + d, mask=d < D, other=0.0)
    slot = tl.load(slot_ptr).to(tl.int64)
    at = slot // PAGE * stride_page + slot % PAGE * stride_slot + head_offset + d
    written = (slot >= 0) & (d < D)
    tl.store(k_pages_ptr + at, key, mask=written)
    tl.store(v_pages_ptr + at, value, mask=written)
    row_max, row_sum, acc = empty_state(q.shape[0], BLOCK_D)
    scores = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    row_max = tl.where(length > 0, scores, row_max)
    row_sum = tl.where(length > 0, 1.0, row_sum)
    acc = tl.where(length > 0, value.to(tl.float32)[None, :], acc)
    return row_max, row_sum, acc
