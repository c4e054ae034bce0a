"""Triton: products of 2 to 64 tokens with weights of 4-bit codes (bitsandbytes), on the matrix unit.

A step takes 32 bytes of each weight row, 64 columns, which lie in one block: they become 16-bit numbers in registers, x is
multiplied with those of upper and those of lower codes, and the sum is multiplied by the magnitude of the block in fp32.
Programs that share rows (split-K) add their parts as in `layer/skinny.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.split_sums import leave_part, sum_parts
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.quantised.codes_row import pick_codes
from hf_fastattn.kernels.quantised.nibbles import block_scales, numbers_of

# Bytes of a row that are multiplied at once.
STEP = tl.constexpr(32)


@triton.jit
def _x_halves(pointers, ok):
    """x of even and of odd columns, `[BLOCK_T, STEP]` each, from words of two: `pointers` and `ok`, of int32."""
    words = tl.load(pointers, mask=ok, other=0)
    return words.to(tl.int16), (words >> 16).to(tl.int16)


@triton.jit
def _product(x_even, x_odd, packed, scale, KIND: tl.constexpr):
    """`[BLOCK_T, BLOCK_N]`: x times `packed: [BLOCK_N, STEP]`."""
    upper, lower = numbers_of(packed, KIND, x_even.dtype)
    part = tl.dot(x_even, tl.trans(upper))
    return tl.dot(x_odd, tl.trans(lower), part) * scale[None, :]


@triton.jit
def _store(
    acc, acc_u, y_ptr, residual_ptr, b_ptr, n, t, rows, tokens, column, stride_y, stride_r, GATED: tl.constexpr
):  # fmt: skip
    """`[BLOCK_T, BLOCK_N]` sums to the rows of y."""
    ok = (t < tokens)[:, None] & (n < rows)[None, :]
    if GATED:
        acc = silu_gate(acc, acc_u)
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + t[:, None] * stride_r + n[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + t[:, None] * stride_y + (column + n)[None, :], acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def codes_tokens_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, partial_ptr, arrived_ptr,
    tokens, n0, n1, n2, stride_x, stride_y, stride_r,
    K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, FACTOR: tl.constexpr,
    WEIGHTS: tl.constexpr, GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, UNROLLED: tl.constexpr,
    STAGES: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one weight, or of w0 and w1 if GATED, times `x: [tokens, K]`, in PART of its bytes."""
    if OVERLAP:
        gdc_launch_dependents()
    BYTES: tl.constexpr = K // 2
    BLOCKS: tl.constexpr = K // BLOCK
    number = tl.program_id(0)
    part = tl.program_id(1)
    which, rows, column, tile = find_tile(number, n0, n1, n2, BLOCK_N, WEIGHTS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.arange(0, BLOCK_T)
    # Instead of a mask: past the last row, the last row is read again.
    row = tl.minimum(n, rows - 1)
    inner = tl.arange(0, STEP)[None, :]
    off_w = row.to(tl.int64)[:, None] * BYTES + inner  # [BLOCK_N, STEP]
    x_words_ptr = (x_ptr + t[:, None] * stride_x).to(tl.pointer_type(tl.int32)) + inner  # [BLOCK_T, STEP]
    ok_t = (t < tokens)[:, None]
    if OVERLAP and not SETTLED:
        gdc_wait()
    codes_ptr, absmax_ptr, nested_ptr, levels_ptr, offset = pick_codes(which, w0, w1, w2, WEIGHTS, NESTED)
    codes_tile_ptr = codes_ptr + off_w
    if GATED:
        codes_u_ptr, absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u = pick_codes(1, w0, w1, w2, 2, NESTED)
        codes_u_tile_ptr = codes_u_ptr + off_w
    if OVERLAP and SETTLED:
        gdc_wait()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    acc_u = acc
    for first in tl.range(part * PART, tl.minimum((part + 1) * PART, BYTES), STEP * UNROLLED, num_stages=STAGES):
        for step in tl.static_range(UNROLLED):
            byte = first + step * STEP
            block = byte // (BLOCK // 2)
            packed = tl.load(codes_tile_ptr + byte, eviction_policy="evict_first")
            scale = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, row, block, BLOCKS, NESTED)
            x_even, x_odd = _x_halves(x_words_ptr + byte, ok_t)
            x_even, x_odd = x_even.to(dtype, bitcast=True), x_odd.to(dtype, bitcast=True)
            acc += _product(x_even, x_odd, packed, scale, KIND)
            if GATED:
                packed = tl.load(codes_u_tile_ptr + byte, eviction_policy="evict_first")
                scale = block_scales(absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, row, block, BLOCKS, NESTED)
                acc_u += _product(x_even, x_odd, packed, scale, KIND)
    acc = acc / FACTOR
    acc_u = acc_u / FACTOR
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    if SPLIT == 1:
        _store(acc, acc_u, y_ptr, residual_ptr, b_ptr, n, t, rows, tokens, column, stride_y, stride_r, GATED)
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_T
        cell = t[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [BLOCK_T, BLOCK_N]
        if leave_part(acc, acc_u, cell, number, part, partial_ptr, arrived_ptr, SIZE, SPLIT, GATED):
            total, total_u = sum_parts(cell, number, partial_ptr, arrived_ptr, SIZE, SPLIT, GATED)
            _store(total, total_u, y_ptr, residual_ptr, b_ptr, n, t, rows, tokens, column, stride_y, stride_r, GATED)
