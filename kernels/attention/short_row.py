"""[qk-norm] + RoPE + append + attention of one new token of each of a few short rows, in one launch.

A program takes one query head of a row and a part of the keys; the new token is a part of its own. Keys and values of
earlier tokens do not depend on the launch ahead: a program asks for its first tile of them before it waits, and holds it in
registers. Then it rotates the query by itself. The first program of a kv head writes the new key and value to their slot,
which no program reads. The last program to arrive at a head of a row merges its parts by LSE, as in `decode_row.py`.
Programs have one warp, which waits for no other: with so few keys a launch takes as long as its longest chain of
instructions. All arithmetic is fp32, on the CUDA cores; queries and keys are rounded to the dtype of the pages once they are
rotated, as `append.py` does. The plain PyTorch versions are `rope_reference.rope_append` and `reference.paged_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import ShortRowTile, short_row_tile
from hf_fastattn.kernels.attention.decode_row import MERGE_ELEMENTS, MOST_PARTS, merged_parts
from hf_fastattn.kernels.attention.new_token import angles_of, rotated_head, with_partners
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.launch import LOG2E, arch_of, check_pages, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.quick_launch import launch


@triton.jit
def _tile(
    k_pages_ptr, v_pages_ptr, page_table_ptr, key_n, past, offset, stride_page, stride_slot,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys and values `[BLOCK_N, BLOCK_D]` of the tokens `key_n`, 0 from token `past` on."""
    d = tl.arange(0, BLOCK_D)
    ok_n = key_n < past
    page = tl.load(page_table_ptr + key_n // PAGE, mask=ok_n, other=0)
    # One offset for K and V, whose strides agree.
    slot = page.to(tl.int64) * stride_page + (key_n % PAGE) * stride_slot + offset
    off_kv = slot[:, None] + d[None, :]
    ok = ok_n[:, None] & (d < D)[None, :]
    return tl.load(k_pages_ptr + off_kv, mask=ok, other=0.0), tl.load(v_pages_ptr + off_kv, mask=ok, other=0.0)


@triton.jit
def _add_tile(q, k, v, ok_n, scale, row_max, row_sum, acc):
    """The state of the online softmax, two numbers and `acc: [BLOCK_D]`, after a tile of keys."""
    scores = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale  # [BLOCK_N]
    scores = tl.where(ok_n, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 0))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(scores - shift)
    decay = tl.math.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(p, 0)
    acc = acc * decay + tl.sum(v.to(tl.float32) * p[:, None], 0)
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["window", "splits"])
def short_row_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, k_pages_ptr, v_pages_ptr, page_table_ptr, seq_lens_ptr, slot_ptr,
    q_norm_ptr, k_norm_ptr, partial_ptr, partial_sum_ptr, arrived_ptr, splits, window, scale, eps,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ct, stride_st, stride_page, stride_slot,
    stride_head, stride_row,
    HEADS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MERGE_PARTS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, HAS_WINDOW: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query head and one part: the new token, or of the earlier ones a tile, or several if `splits` parts hold more."""
    head = tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS
    row = tl.program_id(1)
    group = head // RATIO
    q_ptr += row * stride_qt
    k_ptr += row * stride_kt
    v_ptr += row * stride_vt
    cos_ptr += row * stride_ct
    sin_ptr += row * stride_st
    page_table_ptr += row.to(tl.int64) * stride_row
    number = row * HEADS + head
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    if OVERLAP and not SETTLED:
        gdc_wait()
    length = tl.load(seq_lens_ptr + row)
    past = tl.maximum(length - 1, 0)
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - window, 0)
    tiles = tl.cdiv(past - lowest, BLOCK_N)
    parts = tl.minimum(splits, tiles)
    if part > parts:
        return
    offset = group * stride_head
    dtype = k_pages_ptr.dtype.element_ty
    NORMS: tl.constexpr = q_norm_ptr is not None
    q_norm = ()
    if NORMS:
        q_norm = with_partners(q_norm_ptr, D, ROTARY, BLOCK_D)
    if part == 0:
        # The new token, whose key and value no other program needs.
        k_norm = ()
        if NORMS:
            k_norm = with_partners(k_norm_ptr, D, ROTARY, BLOCK_D)
        if OVERLAP:
            gdc_launch_dependents()
            if SETTLED:
                gdc_wait()
        angles = angles_of(cos_ptr, sin_ptr, ROTARY, BLOCK_D)
        raw = with_partners(q_ptr + head * stride_qh, D, ROTARY, BLOCK_D)
        raw_k = with_partners(k_ptr + group * stride_kh, D, ROTARY, BLOCK_D)
        value = tl.load(v_ptr + group * stride_vh + d, mask=d < D, other=0.0)
        slot = tl.load(slot_ptr + row).to(tl.int64)
        q = rotated_head(raw, q_norm, angles, eps, D, ROTARY, NORMS, UNIT_OFFSET).to(dtype).to(tl.float32)
        key = rotated_head(raw_k, k_norm, angles, eps, D, ROTARY, NORMS, UNIT_OFFSET).to(dtype)
        written = (head % RATIO == 0) & (slot >= 0) & (d < D)
        at = slot // PAGE * stride_page + slot % PAGE * stride_slot + offset + d
        tl.store(k_pages_ptr + at, key, mask=written)
        tl.store(v_pages_ptr + at, value, mask=written)
        row_max = tl.where(length > 0, tl.sum(key.to(tl.float32) * q, 0) * scale, float("-inf"))
        row_sum = tl.where(length > 0, 1.0, 0.0)
        acc = tl.where(length > 0, value.to(tl.float32), 0.0)
    else:
        start = lowest + tiles * (part - 1) // parts * BLOCK_N
        stop = tl.minimum(lowest + tiles * part // parts * BLOCK_N, past)
        k, v = _tile(
            k_pages_ptr, v_pages_ptr, page_table_ptr, start + n, stop, offset, stride_page, stride_slot, PAGE, D, BLOCK_D
        )
        if OVERLAP:
            gdc_launch_dependents()
            if SETTLED:
                gdc_wait()
        angles = angles_of(cos_ptr, sin_ptr, ROTARY, BLOCK_D)
        raw = with_partners(q_ptr + head * stride_qh, D, ROTARY, BLOCK_D)
        q = rotated_head(raw, q_norm, angles, eps, D, ROTARY, NORMS, UNIT_OFFSET).to(dtype).to(tl.float32)
        row_max, row_sum, acc = _add_tile(
            q, k, v, start + n < stop, scale, float("-inf"), 0.0, tl.zeros([BLOCK_D], tl.float32)
        )
        for first in range(start + BLOCK_N, stop, BLOCK_N):
            k, v = _tile(
                k_pages_ptr, v_pages_ptr, page_table_ptr, first + n, stop, offset, stride_page, stride_slot,
                PAGE, D, BLOCK_D,
            )  # fmt: skip
            row_max, row_sum, acc = _add_tile(q, k, v, first + n < stop, scale, row_max, row_sum, acc)
    out_at = out_ptr + number * D + d
    if parts == 0:
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        states = number * (splits + 1)
        tl.store(partial_ptr + (states + part) * BLOCK_D + d, acc)
        tl.store(partial_sum_ptr + (states + part) * 2, row_max)
        tl.store(partial_sum_ptr + (states + part) * 2 + 1, row_sum)
        # Every thread has stored its share of the part before one of them counts it.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + number, 1, sem="acq_rel", scope="gpu")
        if arrived == parts:
            tl.store(arrived_ptr + number, 0)
            _, total_sum, total = merged_parts(partial_ptr, partial_sum_ptr, states, parts + 1, 1, BLOCK_D, MERGE_PARTS)
            out = tl.sum(total / total_sum[:, None], 0)
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=d < D)


def takes(q: Tensor, k_pages: Tensor, most_heads: int) -> bool:
    """Whether there is a tile for these queries and pages, and no more heads than `configs.short_heads` gave."""
    _, heads, dim = q.shape
    tile = short_row_tile(arch_of(q.device), q.element_size(), power_of_2(dim), heads)
    return k_pages.dtype is q.dtype and tile is not None and heads <= most_heads


def short_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slot_mapping: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None,
    workspace: Workspace,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
    keys_settled: bool = False,
    tile: ShortRowTile | None = None,
) -> Tensor:
    """`rope_append` and attention of the one new token of each row, over pages that it is written to as well.

    Args:
        q: `[B, H, D]` queries, before norm and RoPE; bf16 or fp16, any strides but 1 in the last dimension.
        k: `[B, G, D]` keys, likewise; `v` the values, stored as they are.
        cos: `[B, rotary dims]`; `sin` likewise, with its sign folded in by `rope_reference.signed_sin`.
        k_pages: `[N, P, G, D]` pages of keys, written in place; `v_pages` of values, with the same strides.
        slot_mapping: `[B]` int32, `page * P + offset` of each new token; if negative, it is not written.
        page_table: `[B, columns]` int32.
        seq_lens: `[B]` int32, keys of each row with the new one; 0 of a row that takes no part.
        scale: factor on the scores.
        window: keys that the token sees, itself included; all by default.
        workspace: room for partial states, for one stream.
        q_norm: `[D]` weight of the RMSNorm on queries, if the model has one; `k_norm` on keys.
        eps: of that norm.
        unit_offset: the norm multiplies by `1 + weight`.
        keys_settled: no launch that may still be running writes keys or values of earlier tokens, page table or length, so
            these are read before the launch ahead has ended. Launches overlap, so the one before the last counts too.
        tile: launch configuration, for measuring; by default that of `configs.short_row_tile`.

    Returns:
        `[B, H, D]` in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_pages(q, k_pages, v_pages)
    rows, heads, dim = q.shape
    groups, block_d = k_pages.shape[2], power_of_2(dim)
    arch = arch_of(q.device)
    tile = tile or short_row_tile(arch, q.element_size(), block_d, heads)
    if tile is None or q.element_size() != 2 or k_pages.dtype is not q.dtype or seq_lens.shape != (rows,):
        raise ValueError(
            f"q {tuple(q.shape)}, {q.dtype}, over pages of {k_pages.dtype} and seq_lens {tuple(seq_lens.shape)} must be one "
            "token of 16 bits a row, of a head dim that has a tile; take rope_append and paged_attention"
        )
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    splits = max(min(tile.programs * workspace.processors // (rows * heads), MOST_PARTS), 1)
    partial, partial_sum, arrived = workspace.split_kv(rows * heads * (splits + 1), 1, block_d)
    overlap = overlaps_launches(arch)
    with on_device_of(q):
        launch(
            short_row_kernel, (heads * (splits + 1), rows),
            (
                q, k, v, cos, sin, out, k_pages, v_pages, page_table, seq_lens, slot_mapping, q_norm, k_norm,
                partial, partial_sum, arrived, splits, window or 0, scale * LOG2E, eps,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0), *k_pages.stride()[:3],
                page_table.stride(0),
            ),
            dict(
                HEADS=heads, RATIO=heads // groups, D=dim, ROTARY=cos.shape[-1], PAGE=k_pages.shape[1], BLOCK_D=block_d,
                BLOCK_N=tile.block_n, MERGE_PARTS=max(min(MERGE_ELEMENTS // block_d, 16), 1),
                UNIT_OFFSET=unit_offset, HAS_WINDOW=window is not None, SETTLED=keys_settled, OVERLAP=overlap,
                num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
            ),
        )  # fmt: skip
    return out
