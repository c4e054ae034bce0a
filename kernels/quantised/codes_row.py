"""Triton: products of one token with weights of 4-bit codes (bitsandbytes), dequantised in registers.

As `layer/matvec.py`: a program takes a few rows of a weight, a tile of columns at a time, without the matrix unit. A thread
has four words of a row, 32 columns, at once: they lie in one block, whose magnitude multiplies their sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import find_tile, pick, weight_tile
from hf_fastattn.kernels.quantised.nibbles import block_scales, dot_of_codes

# Words of a row that a thread has at once.
CHUNK = tl.constexpr(4)


class CodePointers(NamedTuple):
    """What a kernel reads of a weight: codes as int32, magnitudes; of nested ones, else None, scales, levels and offset."""

    codes_ptr: Any
    absmax_ptr: Any
    nested_ptr: Any
    levels_ptr: Any
    offset_ptr: Any


@triton.jit
def pick_codes(which, w0, w1, w2, WEIGHTS: tl.constexpr, NESTED: tl.constexpr):
    """The pointers of weight number `which`: codes, magnitudes, and of nested ones their scales, levels and offset."""
    codes = pick(which, w0.codes_ptr, w1.codes_ptr, w2.codes_ptr, WEIGHTS)
    absmax = pick(which, w0.absmax_ptr, w1.absmax_ptr, w2.absmax_ptr, WEIGHTS)
    # Nobody reads what stands for those of magnitudes that are not nested.
    nested, levels, offset = absmax, absmax, 0.0
    if NESTED:
        nested = pick(which, w0.nested_ptr, w1.nested_ptr, w2.nested_ptr, WEIGHTS)
        levels = pick(which, w0.levels_ptr, w1.levels_ptr, w2.levels_ptr, WEIGHTS)
        offset = tl.load(pick(which, w0.offset_ptr, w1.offset_ptr, w2.offset_ptr, WEIGHTS))
    return codes, absmax, nested, levels, offset


@triton.jit
def _pair(x_ptr, at, ok):
    """x of two columns, in fp32."""
    if x_ptr.dtype.element_ty == tl.float32:
        first = tl.load(x_ptr + 2 * at, mask=ok, other=0.0)
        second = tl.load(x_ptr + 2 * at + 1, mask=ok, other=0.0)
    else:
        pair = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + at, mask=ok, other=0)
        if x_ptr.dtype.element_ty == tl.bfloat16:
            first = (pair << 16).to(tl.float32, bitcast=True)
            second = (pair & -65536).to(tl.float32, bitcast=True)
        else:
            first = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            second = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def _partial(
    words, words_u, scale, scale_u, x_ptr, word, GATED: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """The products of words `[BLOCK_N, BLOCK_W]` from `word` on with x, added up by chunks: `[BLOCK_N, BLOCK_W / CHUNK]`."""
    BLOCK_W: tl.constexpr = words.shape[1]
    shape: tl.constexpr = (words.shape[0], BLOCK_W // CHUNK, CHUNK)
    at = word + tl.arange(0, BLOCK_W)
    ok = at < WORDS
    x0, x1 = _pair(x_ptr, 4 * at, ok)
    x2, x3 = _pair(x_ptr, 4 * at + 1, ok)
    x4, x5 = _pair(x_ptr, 4 * at + 2, ok)
    x6, x7 = _pair(x_ptr, 4 * at + 3, ok)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    dots = dot_of_codes(words, x0, x1, x2, x3, x4, x5, x6, x7, KIND, dtype)
    part = tl.sum(tl.reshape(dots, shape), 2) * scale
    part_u = part
    if GATED:
        dots = dot_of_codes(words_u, x0, x1, x2, x3, x4, x5, x6, x7, KIND, dtype)
        part_u = tl.sum(tl.reshape(dots, shape), 2) * scale_u
    return part, part_u


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def codes_row_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, n0, n1, n2,
    K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, FACTOR: tl.constexpr,
    WEIGHTS: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
    SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one weight, or of w0 and w1 if GATED, times `x: [K]`."""
    if OVERLAP:
        gdc_launch_dependents()
    WORDS: tl.constexpr = K // 8
    BLOCKS: tl.constexpr = K // BLOCK
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, BLOCK_N, WEIGHTS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Instead of a mask: past the last row, the last row is read again.
    row = tl.minimum(n, rows - 1)
    off_w = row.to(tl.int64)[:, None] * WORDS + tl.arange(0, BLOCK_W)[None, :]  # [BLOCK_N, BLOCK_W]
    if OVERLAP and not SETTLED:
        gdc_wait()
    codes_ptr, absmax_ptr, nested_ptr, levels_ptr, offset = pick_codes(which, w0, w1, w2, WEIGHTS, NESTED)
    if GATED:
        codes_u_ptr, absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u = pick_codes(1, w0, w1, w2, 2, NESTED)
    chunk = tl.arange(0, BLOCK_W // CHUNK) * CHUNK
    w = weight_tile(codes_ptr + off_w, 0, WORDS, BLOCK_W)
    block = tl.minimum(chunk, WORDS - 1) // (BLOCK // 8)
    scale = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, row[:, None], block[None, :], BLOCKS, NESTED)
    u, scale_u = w, scale
    if GATED:
        u = weight_tile(codes_u_ptr + off_w, 0, WORDS, BLOCK_W)
        scale_u = block_scales(
            absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, row[:, None], block[None, :], BLOCKS, NESTED
        )
    if OVERLAP and SETTLED:
        gdc_wait()
    # Bias and residual are loaded early, so that their latency is hidden by the loop.
    ok = n < rows
    added = tl.zeros([BLOCK_N], tl.float32)
    if b0_ptr is not None:
        added += tl.load(pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS) + n, mask=ok, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        added += tl.load(residual_ptr + n, mask=ok, other=0.0).to(tl.float32)
    acc, acc_u = _partial(w, u, scale, scale_u, x_ptr, 0, GATED, WORDS, KIND)
    for word in tl.range(BLOCK_W, WORDS, BLOCK_W, num_stages=STAGES):
        w = weight_tile(codes_ptr + off_w, word, WORDS, BLOCK_W)
        block = tl.minimum(word + chunk, WORDS - 1) // (BLOCK // 8)
        scale = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, row[:, None], block[None, :], BLOCKS, NESTED)
        u, scale_u = w, scale
        if GATED:
            u = weight_tile(codes_u_ptr + off_w, word, WORDS, BLOCK_W)
            scale_u = block_scales(
                absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, row[:, None], block[None, :], BLOCKS, NESTED
            )
        part, part_u = _partial(w, u, scale, scale_u, x_ptr, word, GATED, WORDS, KIND)
        acc += part
        if GATED:
            acc_u += part_u
    y = tl.sum(acc, 1) / FACTOR  # [BLOCK_N]
    if GATED:
        y = silu_gate(y, tl.sum(acc_u, 1) / FACTOR)
    tl.store(y_ptr + column + n, (y + added).to(y_ptr.dtype.element_ty), mask=ok)
