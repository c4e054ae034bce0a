"""Triton: products of one token with 4-bit weights in tinygemm's order (`weights.TiledInts`), dequantised in registers.

An integer below the exponent of the power of two that its bits are worth is that power plus the integer: one instruction
makes a number of it, wherever in the word it lies. What is added up in a group is multiplied by the group's scale, and the
sum of x by its offset. Five of a word's eight integers lie within the 23 bits of an fp32 number, three after a shift.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.eight_bits import ASSEMBLY
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import find_tile, pick


def product_assembly() -> str:
    """The sum of the products of a word's eight integers less 8, $1, with $2 to $9, in $0."""
    steps = ["{ .reg .b32 high, bits; .reg .f32 v, sum; shr.u32 high, $1, 12; mov.f32 sum, 0f00000000; "]
    for pair in range(4):
        for odd in range(2):
            # Of odd columns but the first the shifted word holds them.
            word, bit = ("high", 4 + 4 * pair) if odd and pair else ("$1", 16 * odd + 4 * pair)
            power = torch.tensor(2.0 ** (23 - bit))
            magic, less = (number.view(torch.int32).item() for number in (power, power + 8))
            steps.append(
                f"and.b32 bits, {word}, {15 << bit}; or.b32 bits, bits, {magic}; mov.b32 v, bits; "
                f"sub.f32 v, v, 0f{less:08X}; fma.rn.f32 sum, v, ${2 + 2 * pair + odd}, sum; "
            )
    return "".join(steps) + "mov.f32 $0, sum; }"


PRODUCT = tl.constexpr(product_assembly())


class TilePointers(NamedTuple):
    """What a kernel reads of a weight."""

    words_ptr: Any
    scales_ptr: Any


@triton.jit
def _x_pair(x_ptr, column, columns):
    """x, bf16, of even columns and of those behind them, in fp32; 0 beyond its end, where the weight is only padded."""
    pair = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + column // 2, mask=column < columns, other=0)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _integers(words, PAIR: tl.constexpr):
    """`q - 8` of the even and the odd column of pair PAIR, from 0 to 3, in each of `words`."""
    even, odd = words >> 4 * PAIR & 15, words >> 16 + 4 * PAIR & 15
    return even.to(tl.float32) - 8.0, odd.to(tl.float32) - 8.0


@triton.jit
def _dot(words, x0, x1, x2, x3, x4, x5, x6, x7):
    """The sum of the products of the eight integers of each word with eight columns of x, in fp32."""
    if ASSEMBLY:
        total = tl.inline_asm_elementwise(
            PRODUCT, "=&f,r,f,f,f,f,f,f,f,f", [words, x0, x1, x2, x3, x4, x5, x6, x7], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        x = (x0, x1, x2, x3, x4, x5, x6, x7)
        total = tl.zeros(words.shape, tl.float32)
        for pair in range(4):
            even, odd = _integers(words, pair)
            total += even * x[2 * pair] + odd * x[2 * pair + 1]
    return total


@triton.jit
def _scales(scales_ptr, n, group, padded):
    """Scale and offset of the groups `group` of rows `n`, in fp32; of each row the one lies behind the other."""
    pair = tl.load(scales_ptr.to(tl.pointer_type(tl.int32)) + group * padded + n)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _by_group(x, WHOLE: tl.constexpr):
    """The sums of a lane's words, if they are of one group."""
    if WHOLE:
        total = tl.sum(x, 4, keep_dims=True)
    else:
        total = x
    return total


@triton.jit(do_not_specialize=["n0", "n1", "n2", "columns"])
def tiles_row_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, n0, n1, n2, columns,
    K: tl.constexpr, GROUP: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TILES times 8 rows of one weight, or of w0 and w1 if GATED, times `x: [columns]`, BLOCKS of 128 columns a step."""
    if OVERLAP:
        gdc_launch_dependents()
    which, rows, column, number = find_tile(tl.program_id(0), n0, n1, n2, 8 * TILES, WEIGHTS)
    last = tl.cdiv(rows, 8) - 1
    # Instead of a mask: past the last tile, the last tile is read again.
    tile = tl.minimum(number * TILES + tl.arange(0, TILES), last)  # [TILES]
    n = number * (8 * TILES) + tl.arange(0, TILES)[:, None] * 8 + tl.arange(0, 8)[None, :]  # [TILES, 8]
    # Dimensions: tiles, blocks of columns, rows, lane % 4, word of a lane.
    inner = (tl.arange(0, 8)[:, None, None] * 4 + tl.arange(0, 4)[None, :, None]) * 4 + tl.arange(0, 4)[None, None, :]
    first = tile.to(tl.int64)[:, None, None, None, None] * (K // 128 * 128) + inner[None, None]
    row = tile[:, None, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None, None]
    x_at = tl.arange(0, 4)[None, :, None] * 2 + tl.arange(0, 4)[None, None, :] * 32  # [1, lane % 4, word]
    if OVERLAP and not SETTLED:
        gdc_wait()
    words_ptr = pick(which, w0.words_ptr, w1.words_ptr, w2.words_ptr, WEIGHTS)
    scales_ptr = pick(which, w0.scales_ptr, w1.scales_ptr, w2.scales_ptr, WEIGHTS)
    if OVERLAP and SETTLED:
        gdc_wait()
    # Groups of all four words of a lane, or of less.
    WHOLE: tl.constexpr = GROUP % 128 == 0
    WORDS: tl.constexpr = 1 if WHOLE else 4
    acc = tl.zeros([TILES, BLOCKS, 8, 4, WORDS], tl.float32)
    acc_u = acc
    for begin in tl.range(0, K // 128, BLOCKS, num_stages=STAGES):
        block = begin + tl.arange(0, BLOCKS)
        off_w = first + block[None, :, None, None, None] * 128
        group = (block[:, None] * 128 + tl.arange(0, WORDS)[None, :] * 32) // GROUP  # [BLOCKS, WORDS]
        group = group[None, :, None, None, :]
        words = tl.load(words_ptr + off_w, eviction_policy="evict_first")
        scale, offset = _scales(scales_ptr, row, group, (last + 1) * 8)
        if GATED:
            words_u = tl.load(w1.words_ptr + off_w, eviction_policy="evict_first")
            scale_u, offset_u = _scales(w1.scales_ptr, row, group, (last + 1) * 8)
        at = block[:, None, None] * 128 + x_at  # [BLOCKS, lane % 4, word]
        x0, x1 = _x_pair(x_ptr, at, columns)
        x2, x3 = _x_pair(x_ptr, at + 8, columns)
        x4, x5 = _x_pair(x_ptr, at + 16, columns)
        x6, x7 = _x_pair(x_ptr, at + 24, columns)
        total = _by_group(((x0 + x1) + (x2 + x3) + ((x4 + x5) + (x6 + x7)))[None, :, None], WHOLE)
        x0, x1, x2, x3 = x0[None, :, None], x1[None, :, None], x2[None, :, None], x3[None, :, None]
        x4, x5, x6, x7 = x4[None, :, None], x5[None, :, None], x6[None, :, None], x7[None, :, None]
        acc += _by_group(_dot(words, x0, x1, x2, x3, x4, x5, x6, x7), WHOLE) * scale + total * offset
        if GATED:
            acc_u += _by_group(_dot(words_u, x0, x1, x2, x3, x4, x5, x6, x7), WHOLE) * scale_u + total * offset_u
    y = tl.sum(tl.sum(tl.sum(acc, 4), 3), 1)  # [TILES, 8]
    if GATED:
        y = silu_gate(y, tl.sum(tl.sum(tl.sum(acc_u, 4), 3), 1))
    ok = n < rows
    if b0_ptr is not None:
        y += tl.load(pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS) + n, mask=ok, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + column + n, y.to(y_ptr.dtype.element_ty), mask=ok)
