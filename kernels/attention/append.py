"""[qk-norm] + RoPE + append to the pages, in one launch.

RoPE (Su et al., 2021) in the rotate-half form on the first `cos.shape[-1]` dimensions. A program takes a few tokens and
a few heads: rows `[BLOCK_T * BLOCK_H, D]`, read as the two halves that rotate into each other and the rest, which is not
rotated. Queries go to a new tensor, keys and values to the slots of their tokens. All arithmetic is fp32 with one rounding
at the end, to 8 bits too: a row and its scale are in one program. The plain PyTorch version is `rope_reference.rope_append`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.eight_bits import largest_of, scale_of, scaled
from hf_fastattn.kernels.launch import arch_of, check_pages, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.quick_launch import launch

# Elements of a program's tile, and the most heads in it.
TILE_ELEMENTS = 2048
BLOCK_H = 8


@triton.jit
def _load(base, columns, ok, width):
    """fp32 `[rows, BLOCK]` of the rows at `base: [rows, 1]`; 0 for rows that are not ok, and from column `width` on."""
    return tl.load(base + columns[None, :], mask=ok[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _scale_of(columns, weight_ptr, width, UNIT_OFFSET: tl.constexpr):
    """The norm's factors, fp32, of `columns: [BLOCK]`."""
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return weight + 1.0 if UNIT_OFFSET else weight


@triton.jit
def _normalise_and_rotate(
    x_base, y_base, cos_base, sin_base, ok, norm_ptr, eps,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Rows at `x_base: [rows, 1]`, normalised and rotated, to `y_base: [rows, 1]`, of HALF + HALF + REST columns each.

    Returns the bits of their scales `[rows]`, if these are stored in 8 bits.
    """
    half = tl.arange(0, BLOCK_HALF)
    rest = tl.arange(0, BLOCK_REST)
    x1 = _load(x_base, half, ok, HALF)  # [rows, BLOCK_HALF]
    x2 = _load(x_base + HALF, half, ok, HALF)
    if norm_ptr is not None:
        squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
        if REST > 0:
            x3 = _load(x_base + 2 * HALF, rest, ok, REST)  # [rows, BLOCK_REST]
            squares += tl.sum(x3 * x3, 1)
        inverse = tl.rsqrt(squares / (2 * HALF + REST) + eps)[:, None]  # [rows, 1]
        x1 = x1 * inverse * _scale_of(half, norm_ptr, HALF, UNIT_OFFSET)[None, :]
        x2 = x2 * inverse * _scale_of(half, norm_ptr + HALF, HALF, UNIT_OFFSET)[None, :]
    out_ok = ok[:, None] & (half < HALF)[None, :]
    dtype = y_base.dtype.element_ty
    # The sign of rotate_half is folded into sin.
    y1 = x1 * _load(cos_base, half, ok, HALF) + x2 * _load(sin_base, half, ok, HALF)
    y2 = x2 * _load(cos_base + HALF, half, ok, HALF) + x1 * _load(sin_base + HALF, half, ok, HALF)
    scale = 0
    if dtype.primitive_bitwidth == 8:
        largest, poison = largest_of(y1, y2)
        if REST > 0:
            x3 = _load(x_base + 2 * HALF, rest, ok, REST)
            if norm_ptr is not None:
                x3 = x3 * inverse * _scale_of(rest, norm_ptr + 2 * HALF, REST, UNIT_OFFSET)[None, :]
            rest_largest, rest_poison = largest_of(x3, x3)
            largest = tl.maximum(largest, rest_largest)
            poison += rest_poison
        scale, factor = scale_of(largest, poison, dtype)
        y1 = scaled(y1, factor, dtype)
        y2 = scaled(y2, factor, dtype)
    tl.store(y_base + half[None, :], y1.to(dtype), mask=out_ok)
    tl.store(y_base + HALF + half[None, :], y2.to(dtype), mask=out_ok)
    if REST > 0:
        if dtype.primitive_bitwidth == 8:
            x3 = scaled(x3, factor, dtype)
        elif norm_ptr is not None:
            x3 = x3 * inverse * _scale_of(rest, norm_ptr + 2 * HALF, REST, UNIT_OFFSET)[None, :]
        else:
            x3 = _load(x_base + 2 * HALF, rest, ok, REST)
        tl.store(y_base + 2 * HALF + rest[None, :], x3.to(dtype), mask=ok[:, None] & (rest < REST)[None, :])
    return scale


@triton.jit(do_not_specialize=["tokens"])
def rope_append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, k_pages_ptr, v_pages_ptr, slot_ptr, q_norm_ptr, k_norm_ptr,
    tokens, eps,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ct, stride_st,
    stride_page, stride_slot, stride_head,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT_OFFSET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens, BLOCK_H heads of q, or of k and v."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    D: tl.constexpr = 2 * HALF + REST
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    row = tl.arange(0, BLOCK_T * BLOCK_H)  # heads innermost
    token = (tl.program_id(0) * BLOCK_T + row // BLOCK_H).to(tl.int64)
    block = tl.program_id(1)
    cos_base = (cos_ptr + token * stride_ct)[:, None]  # [rows, 1], as all that end in _base
    sin_base = (sin_ptr + token * stride_st)[:, None]
    if block < Q_BLOCKS:
        head = block * BLOCK_H + row % BLOCK_H
        ok = (token < tokens) & (head < HEADS)
        x_base = (q_ptr + token * stride_qt + head * stride_qh)[:, None]
        y_base = (out_ptr + (token * HEADS + head) * D)[:, None]
        _normalise_and_rotate(
            x_base, y_base, cos_base, sin_base, ok, q_norm_ptr, eps, HALF, REST, BLOCK_HALF, BLOCK_REST, UNIT_OFFSET
        )
    else:
        head = (block - Q_BLOCKS) * BLOCK_H + row % BLOCK_H
        slot = tl.load(slot_ptr + token, mask=token < tokens, other=-1).to(tl.int64)
        ok = (slot >= 0) & (head < GROUPS)
        off_kv = slot // PAGE * stride_page + slot % PAGE * stride_slot + head * stride_head  # [rows]
        x_base = (k_ptr + token * stride_kt + head * stride_kh)[:, None]
        key_base = (k_pages_ptr + off_kv)[:, None]
        key_scale = _normalise_and_rotate(
            x_base, key_base, cos_base, sin_base, ok, k_norm_ptr, eps, HALF, REST, BLOCK_HALF, BLOCK_REST, UNIT_OFFSET
        )
        column = tl.arange(0, BLOCK_D)
        inside = ok[:, None] & (column < D)[None, :]  # [rows, BLOCK_D]
        v = tl.load((v_ptr + token * stride_vt + head * stride_vh)[:, None] + column[None, :], mask=inside, other=0.0)
        dtype = v_pages_ptr.dtype.element_ty
        if dtype.primitive_bitwidth == 8:
            v = v.to(tl.float32)
            largest, poison = largest_of(v, v)
            value_scale, factor = scale_of(largest, poison, dtype)
            v = scaled(v, factor, dtype).to(dtype)
            # The word that `eight_bits.key_and_value_scales` reads.
            words = k_pages_ptr.to(tl.pointer_type(tl.int32))
            at = slot // PAGE * (stride_page // 4) + PAGE * stride_slot // 2 + head * PAGE + slot % PAGE
            tl.store(words + at, ((key_scale >> 16) & 0xFFFF) | value_scale, mask=ok)
        tl.store((v_pages_ptr + off_kv)[:, None] + column[None, :], v, mask=inside)


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
        q: `[T, H, D]` queries, before norm and RoPE; bf16, fp16 or fp32, any strides but 1 in the last dimension.
        k: `[T, G, D]` keys, likewise; `v` the values, stored as they are.
        cos: `[T, rotary dims]`; `sin` likewise, with its sign folded in by `rope_reference.signed_sin`.
        k_pages: `[N, P, G, D]` pages of keys, written in place; `v_pages` of values, with the same strides. Of 8 bits those
            of `page_formats.page_views`, whose scales are written too.
        slot_mapping: `[T]` int32 or int64, `page * P + offset` of each token; a negative slot is not written.
        q_norm: `[D]` weight of the RMSNorm on queries, if the model has one; `k_norm` on keys.
        eps: of that norm.
        unit_offset: the norm multiplies by `1 + weight`.

    Returns:
        `[T, H, D]` rotated queries.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_pages(q, k_pages, v_pages)
    tokens, heads, dim = q.shape
    groups, rotary = k.shape[1], cos.shape[-1]
    if k.shape != v.shape or tuple(k.shape) != (tokens, k_pages.shape[2], dim):
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [T, G, D] = {(tokens, k_pages.shape[2], dim)}")
    if rotary > dim or rotary % 2 or cos.shape != (tokens, rotary) or sin.shape != cos.shape:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [T, rotary dims], an even number up to {dim}"
        )
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    block_d = power_of_2(dim)
    block_h = min(power_of_2(heads), max(TILE_ELEMENTS // block_d, 1), BLOCK_H)
    # Independent of the number of tokens, so that a token is computed in the same way whatever the others.
    block_t = max(TILE_ELEMENTS // (block_d * block_h), 1)
    overlap = overlaps_launches(arch_of(q.device))
    head_blocks = -(-heads // block_h) + -(-groups // block_h)
    with on_device_of(q):
        arguments = (
            q, k, v, cos, sin, out, k_pages, v_pages, slot_mapping, q_norm, k_norm,
            tokens, eps,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0), *k_pages.stride()[:3],
        )  # fmt: skip
        options = dict(
            HEADS=heads, GROUPS=groups, HALF=rotary // 2, REST=dim - rotary, PAGE=k_pages.shape[1],
            BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_HALF=power_of_2(rotary // 2), BLOCK_REST=power_of_2(dim - rotary),
            BLOCK_D=block_d, UNIT_OFFSET=unit_offset, OVERLAP=overlap,
            num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
        launch(rope_append_kernel, (-(-tokens // block_t), head_blocks), arguments, options)
    return out
