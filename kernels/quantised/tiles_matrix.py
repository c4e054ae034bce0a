"""Triton: products of 1 to 16 tokens with weights in tinygemm's tiles (`weights.TiledInts`), on the matrix unit.

As `codes_matrix.py`; two tiles of 8 rows are fragments of 16. They hold `128 + q`, a number of bf16 with the code's bits at
its end, so that a pair of codes costs two instructions. The 136 that are too many are taken off the sums in fp32, where
the sum of x, a product with ones, takes the offset too: `s (sum (128 + q) x) + (z - 136 s) (sum x)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.assembly import ASSEMBLY
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.lanes import (
    added_up,
    added_up_apart,
    either,
    emulated_product,
    no_sums,
    plus_scaled,
    store_sums,
    two_words,
)
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.quantised.fragments import ones_assembly, tile_assembly

# Rows of a fragment, and columns that a warp takes at once: those of a tile.
ROWS, COLUMNS = tl.constexpr(16), tl.constexpr(128)
PRODUCTS = tl.constexpr([tile_assembly(groups) for groups in (1, 2)])
ONES = tl.constexpr([ones_assembly(groups) for groups in (1, 2)])
EIGHT_ZEROS = tl.constexpr("=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f")
FOUR_ZEROS = tl.constexpr("=&f,=&f,=&f,=&f")
WORDS = tl.constexpr(",r" * 16)


class TilePointers(NamedTuple):
    """What a kernel reads of a weight: words as int64, scale and offset of a group as one int32."""

    words_ptr: Any
    scales_ptr: Any


@triton.jit
def _held_tiles(words_ptr, scales_ptr, low, high, height, part, lane, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """Of part number `part` of two tiles: 16 bytes of a lane of each, and the scales and offsets of its rows."""
    at = part * 64 + lane * 2
    a, b = two_words(words_ptr + low.to(tl.int64) * (PARTS * 64) + at, True)
    c, d = two_words(words_ptr + high.to(tl.int64) * (PARTS * 64) + at, True)
    scales = scales_ptr + (part * 128 // GROUP) * (8 * height) + lane // 4
    return (a, b, c, d), tl.load(scales + 8 * low), tl.load(scales + 8 * high)


@triton.jit
def _x_of_tiles(x_ptr, other_ptr, part, SUMS: tl.constexpr):
    """16 words of x of each lane's token in a part of 128 columns, and with eight sums as many of its other token."""
    p = x_ptr + part * 64
    found = (
        tl.load(p), tl.load(p + 4), tl.load(p + 8), tl.load(p + 12),
        tl.load(p + 16), tl.load(p + 20), tl.load(p + 24), tl.load(p + 28),
        tl.load(p + 32), tl.load(p + 36), tl.load(p + 40), tl.load(p + 44),
        tl.load(p + 48), tl.load(p + 52), tl.load(p + 56), tl.load(p + 60),
    )  # fmt: skip
    if SUMS == 8:
        found = found + _x_of_tiles(other_ptr, other_ptr, part, 4)
    return found


@triton.jit
def _columns_of(x, FIRST: tl.constexpr):
    """The 32 numbers in 16 words of each thread, from word FIRST on, in fp32: `[32 * warps, 32]`."""
    at = tl.arange(0, 16)[None, :]
    words = tl.zeros((x[0].shape[0], 16), tl.int32)
    for i in tl.static_range(16):
        words = tl.where(at == i, x[FIRST + i][:, None], words)
    return _joined(words << 16, words & -65536)


@triton.jit
def _joined(first, second):
    return tl.reshape(tl.join(first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)), (first.shape[0], 32))


@triton.jit
def _weights_of(a, b):
    """`128 + q` of the 32 codes in two int64 of each thread, in the order of `_columns_of`."""
    at = tl.arange(0, 16)[None, :]
    words = tl.where(at < 8, a[:, None], b[:, None]) >> (32 * (at // 4 % 2)).to(tl.int64)
    first = words >> (4 * (at % 4)).to(tl.int64)
    even, odd = (first & 15).to(tl.float32) + 128.0, (first >> 16 & 15).to(tl.float32) + 128.0
    return tl.reshape(tl.join(even, odd), (a.shape[0], 32))


@triton.jit
def _tile_product(w, x, SUMS: tl.constexpr):
    """The sums of 128 columns of two tiles, as those of `plus_scaled`."""
    if not ASSEMBLY:
        low, high = _weights_of(w[0], w[1]), _weights_of(w[2], w[3])
        found = emulated_product(low, high, _columns_of(x, 0))
        if SUMS == 8:
            found = found + emulated_product(low, high, _columns_of(x, 16))
    elif SUMS == 8:
        found = tl.inline_asm_elementwise(
            PRODUCTS.value[1], EIGHT_ZEROS.value + ",l,l,l,l" + WORDS.value + WORDS.value, w + x,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            PRODUCTS.value[0], FOUR_ZEROS.value + ",l,l,l,l" + WORDS.value, w + x,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def _sums_of(x, SUMS: tl.constexpr):
    """The sums of 128 columns of x, as those of a product."""
    if not ASSEMBLY:
        columns = _columns_of(x, 0)
        found = emulated_product(columns * 0.0 + 1.0, columns * 0.0 + 1.0, columns)
        if SUMS == 8:
            others = _columns_of(x, 16)
            found = found + emulated_product(others * 0.0 + 1.0, others * 0.0 + 1.0, others)
    elif SUMS == 8:
        found = tl.inline_asm_elementwise(
            ONES.value[1], EIGHT_ZEROS.value + WORDS.value + WORDS.value, x,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            ONES.value[0], FOUR_ZEROS.value + WORDS.value, x,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def _plus_product(sums, w, scale_low, scale_high, x, SUMS: tl.constexpr):
    """The sums plus the product of a part with x."""
    low = (scale_low << 16).to(tl.float32, bitcast=True)
    high = (scale_high << 16).to(tl.float32, bitcast=True)
    offset_low = (scale_low & -65536).to(tl.float32, bitcast=True) - 136.0 * low
    offset_high = (scale_high & -65536).to(tl.float32, bitcast=True) - 136.0 * high
    # Both terms are large and nearly cancel: they meet before they are added to what other parts gave.
    both = plus_scaled(plus_scaled(no_sums(x[0].shape[0], SUMS), _sums_of(x, SUMS), offset_low, offset_high, SUMS),
                       _tile_product(w, x, SUMS), low, high, SUMS)  # fmt: skip
    return plus_scaled(sums, _as_product(both, SUMS), 1.0, 1.0, SUMS)


@triton.jit
def _as_product(sums, SUMS: tl.constexpr):
    """Sums that a lane keeps, where a product has them."""
    if SUMS == 2:
        found = (sums[0], sums[0], sums[1], sums[1])
    else:
        found = sums
    return found


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def tiles_matrix_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, tokens, n0, n1, n2, stride_x, stride_y, stride_r,
    K: tl.constexpr, GROUP: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr,
    WARPS: tl.constexpr, DEPTH: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """16 rows of one weight, or of w0 and w1 by half of the warps each if GATED, times `x: [tokens, K]`."""
    if OVERLAP:
        gdc_launch_dependents()
    PARTS: tl.constexpr = K // COLUMNS.value
    # Warps that share the columns of a weight; each takes equally many.
    SHARERS: tl.constexpr = WARPS // 2 if GATED else WARPS
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, ROWS.value, WEIGHTS)
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32 % SHARERS
    if OVERLAP and not SETTLED:
        gdc_wait()
    words_ptr = pick(which, w0.words_ptr, w1.words_ptr, w2.words_ptr, WEIGHTS)
    scales_ptr = pick(which, w0.scales_ptr, w1.scales_ptr, w2.scales_ptr, WEIGHTS)
    up = thread >= 32 * SHARERS
    if GATED:
        words_ptr, scales_ptr = either(up, words_ptr, w1.words_ptr), either(up, scales_ptr, w1.scales_ptr)
    height = (rows + 7) // 8
    # Instead of a mask: past the last tile or token, the last one is read again.
    low = tl.minimum(2 * tile, height - 1)
    high = tl.minimum(2 * tile + 1, height - 1)
    words, scale_low, scale_high = _held_tiles(words_ptr, scales_ptr, low, high, height, warp, lane, PARTS, GROUP)
    next_words, next_low, next_high = words, scale_low, scale_high
    if DEPTH == 2 and PARTS > SHARERS:
        next_words, next_low, next_high = _held_tiles(
            words_ptr, scales_ptr, low, high, height, warp + SHARERS, lane, PARTS, GROUP
        )
    if OVERLAP and SETTLED:
        gdc_wait()
    x2_ptr = x_ptr.to(tl.pointer_type(tl.int32)) + lane % 4
    other_ptr = x2_ptr + tl.minimum(lane // 4 + 8, tokens - 1) * (stride_x // 2)
    if SUMS > 2:
        x2_ptr += tl.minimum(lane // 4, tokens - 1) * (stride_x // 2)
    acc = no_sums(32 * WARPS, SUMS)
    for first in tl.range(0, PARTS, SHARERS, num_stages=1):
        part = first + warp
        last_words, last_low, last_high = next_words, next_low, next_high
        if first + DEPTH * SHARERS < PARTS:
            after = part + DEPTH * SHARERS
            last_words, last_low, last_high = _held_tiles(
                words_ptr, scales_ptr, low, high, height, after, lane, PARTS, GROUP
            )
        x = _x_of_tiles(x2_ptr, other_ptr, part, SUMS)
        acc = _plus_product(acc, words, scale_low, scale_high, x, SUMS)
        if DEPTH == 2:
            words, scale_low, scale_high = next_words, next_low, next_high
        else:
            words, scale_low, scale_high = last_words, last_low, last_high
        next_words, next_low, next_high = last_words, last_low, last_high
    if GATED:
        gate, of_up = added_up_apart(acc, up, SUMS)
        y = silu_gate(gate, of_up)
    else:
        y = added_up(acc, SUMS)
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    store_sums(y, y_ptr, residual_ptr, b_ptr, tile * ROWS.value, rows, tokens, column, stride_y, stride_r)
