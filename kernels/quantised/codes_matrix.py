"""Triton: products of 1 to 16 tokens with weights of 4-bit codes (bitsandbytes), on the matrix unit.

A program takes 16 rows of a weight, or of gate and of up; its warps share the columns, 256 at a time. Codes become pairs of
16-bit numbers by a table of all bytes in shared memory, of which each lane has a copy in its own bank (`fragments.py`). The
sums of 64 columns are multiplied with their magnitudes in fp32: a weight errs less than if it were rounded to 16 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.assembly import ASSEMBLY, FORMS
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.lanes import (
    added_up,
    emulated_product,
    no_sums,
    numbers_of,
    of_lane,
    plus_scaled,
    store_sums,
    two_words,
)
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.quantised.codes_row import pick_codes
from hf_fastattn.kernels.quantised.fragments import codes_assembly, table_assembly
from hf_fastattn.kernels.quantised.nibbles import MATRIX, compared, matrix_bits
from hf_fastattn.kernels.quantised.weights import VALUES

# Rows of a fragment, and columns that a warp takes at once: four of its blocks.
ROWS, COLUMNS = tl.constexpr(16), tl.constexpr(256)
# What a fragment's product takes at once; blocks are no smaller.
PRODUCT_COLUMNS = tl.constexpr(64)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TABLES = tl.constexpr({
    f"{kind} {name} {entries}": table_assembly(matrix_bits(kind, dtype), entries)
    for kind in VALUES for name, dtype in DTYPES.items() for entries in (1, 2, 4)
})  # fmt: skip
PRODUCTS = tl.constexpr({f"{name} {groups}": codes_assembly(name, groups) for name in FORMS for groups in (1, 2)})


@triton.jit
def _table(thread, KIND: tl.constexpr, dtype: tl.constexpr):
    """Where in shared memory the column of each lane in the table of values begins."""
    THREADS: tl.constexpr = thread.shape[0]
    if ASSEMBLY:
        ENTRIES: tl.constexpr = 256 // THREADS if THREADS < 256 else 1
        distance = tl.full(thread.shape, THREADS, tl.int32)
        table = tl.inline_asm_elementwise(
            TABLES.value[f"{KIND} {dtype} {ENTRIES}"], "=&r,r,r,r", [thread % 256, thread % 32, distance],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()
    else:
        table = thread
    return table


@triton.jit
def _product(low, high, x, table, KIND: tl.constexpr, dtype: tl.constexpr, SUMS: tl.constexpr):
    """The sums of 64 columns, as those of `plus_scaled`."""
    if not ASSEMBLY:
        values: tl.constexpr = MATRIX.value[f"{KIND} {dtype}"]
        at = tl.arange(0, 16)[None, :]
        # The upper code of a byte is that of the earlier column.
        shift = (8 * (at // 2) + 4 * (1 - at % 2)).to(tl.int64)
        a, b = compared(low[:, None] >> shift & 15, values), compared(high[:, None] >> shift & 15, values)
        found = emulated_product(a, b, numbers_of(x[0], x[1], x[2], x[3], dtype))
        if SUMS == 8:
            found = found + emulated_product(a, b, numbers_of(x[4], x[5], x[6], x[7], dtype))
    elif SUMS == 8:
        found = tl.inline_asm_elementwise(
            PRODUCTS.value[f"{dtype} 2"], "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,l,l,l,l,l,l,l,l,l,l,r",
            [low, high, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], table],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            PRODUCTS.value[f"{dtype} 1"], "=&f,=&f,=&f,=&f,l,l,l,l,l,l,r", [low, high, x[0], x[1], x[2], x[3], table],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def _held(weight, low, high, lane, part, K: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """Of part number `part` of rows `low` and `high`: 8 bytes of codes in each of four times 64 columns, and two magnitudes.

    Magnitudes are as they lie in memory: what they stand for is looked up later, so that no load waits for another.
    """
    codes_ptr, absmax_ptr, nested_ptr, _, _ = weight
    # Where there are no more columns the last are read again: x is zero there.
    last: tl.constexpr = K // PRODUCT_COLUMNS.value - 1
    p, q = codes_ptr + low * (K // 16) + lane, codes_ptr + high * (K // 16) + lane
    if K % COLUMNS.value == 0:
        first = 4 * tl.minimum(part, K // COLUMNS.value - 1)
        block = first + lane
        a = 4 * first
        b, c, d = a + 4, a + 8, a + 12
    else:
        first = 4 * part
        block = tl.minimum(first + lane, last)
        a, b = 4 * tl.minimum(first, last), 4 * tl.minimum(first + 1, last)
        c, d = 4 * tl.minimum(first + 2, last), 4 * tl.minimum(first + 3, last)
    words = (
        tl.load(p + a, eviction_policy="evict_first"), tl.load(q + a, eviction_policy="evict_first"),
        tl.load(p + b, eviction_policy="evict_first"), tl.load(q + b, eviction_policy="evict_first"),
        tl.load(p + c, eviction_policy="evict_first"), tl.load(q + c, eviction_policy="evict_first"),
        tl.load(p + d, eviction_policy="evict_first"), tl.load(q + d, eviction_policy="evict_first"),
    )  # fmt: skip
    at_low = low * (K // BLOCK) + block * PRODUCT_COLUMNS.value // BLOCK
    at_high = high * (K // BLOCK) + block * PRODUCT_COLUMNS.value // BLOCK
    absmax_low, absmax_high = tl.load(absmax_ptr + at_low), tl.load(absmax_ptr + at_high)
    if NESTED:
        nested_low, nested_high = tl.load(nested_ptr + at_low // 256), tl.load(nested_ptr + at_high // 256)
        return words, (absmax_low, absmax_high, nested_low, nested_high)
    else:
        return words, (absmax_low, absmax_high)


@triton.jit
def _scales(weight, absmax, NESTED: tl.constexpr):
    """The magnitudes that two rows have."""
    _, _, _, levels_ptr, offset = weight
    if NESTED:
        low = tl.load(levels_ptr + absmax[0].to(tl.int32)) * absmax[2] + offset
        high = tl.load(levels_ptr + absmax[1].to(tl.int32)) * absmax[3] + offset
    else:
        low, high = absmax
    return low, high


@triton.jit
def _x_of(x_ptr, other_ptr, product, K: tl.constexpr, SUMS: tl.constexpr, WHOLE: tl.constexpr):
    """16 columns, those of product number `product`, of each lane's token, and with eight sums of its other token."""
    last: tl.constexpr = K // PRODUCT_COLUMNS.value - 1
    at = 16 * (product if WHOLE else tl.minimum(product, last))
    a, b = two_words(x_ptr + at, False)
    c, d = two_words(x_ptr + at + 2, False)
    if not WHOLE:
        inside = product <= last
        a, b, c, d = tl.where(inside, a, 0), tl.where(inside, b, 0), tl.where(inside, c, 0), tl.where(inside, d, 0)
    if SUMS != 8:
        return (a, b, c, d)
    else:
        e, f = two_words(other_ptr + at, False)
        g, h = two_words(other_ptr + at + 2, False)
        if not WHOLE:
            e, f, g, h = tl.where(inside, e, 0), tl.where(inside, f, 0), tl.where(inside, g, 0), tl.where(inside, h, 0)
        return (a, b, c, d, e, f, g, h)


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def codes_matrix_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, tokens, n0, n1, n2, stride_x, stride_y, stride_r,
    K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, FACTOR: tl.constexpr,
    WEIGHTS: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """16 rows of one weight, or of w0 and w1 if GATED, times `x: [tokens, K]`."""
    if OVERLAP:
        gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # How often each warp takes some of the columns.
    ROUNDS: tl.constexpr = (K + COLUMNS.value * WARPS - 1) // (COLUMNS.value * WARPS)
    WHOLE: tl.constexpr = K % (COLUMNS.value * WARPS) == 0
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, ROWS.value, WEIGHTS)
    thread = tl.arange(0, 32 * WARPS)
    group, lane, warp = thread % 32 // 4, thread % 4, thread // 32
    if OVERLAP and not SETTLED:
        gdc_wait()
    weight = pick_codes(which, w0, w1, w2, WEIGHTS, NESTED)
    # Instead of masks: past the last row or token, the last one is read again. Offsets in words of 8 bytes fit 32 bits.
    low = tl.minimum(tile * ROWS.value + group, rows - 1)
    high = tl.minimum(tile * ROWS.value + group + 8, rows - 1)
    words, absmax = _held(weight, low, high, lane, warp, K, BLOCK, NESTED)
    words_u, absmax_u = words, absmax
    if GATED:
        weight_u = pick_codes(1, w0, w1, w2, 2, NESTED)
        words_u, absmax_u = _held(weight_u, low, high, lane, warp, K, BLOCK, NESTED)
    # The table is made while the first codes are on their way.
    table = _table(thread, KIND, dtype)
    if OVERLAP and SETTLED:
        gdc_wait()
    x8_ptr = x_ptr.to(tl.pointer_type(tl.int64)) + 4 * lane
    other_ptr = x8_ptr + tl.minimum(group + 8, tokens - 1) * (stride_x // 4)
    if SUMS > 2:
        x8_ptr += tl.minimum(group, tokens - 1) * (stride_x // 4)
    acc = no_sums(32 * WARPS, SUMS)
    acc_u = acc
    for round in tl.range(0, ROUNDS, num_stages=1):
        part = round * WARPS + warp
        next_words, next_absmax, next_words_u, next_absmax_u = words, absmax, words_u, absmax_u
        if AHEAD:
            if round + 1 < ROUNDS:
                next_words, next_absmax = _held(weight, low, high, lane, part + WARPS, K, BLOCK, NESTED)
                if GATED:
                    next_words_u, next_absmax_u = _held(weight_u, low, high, lane, part + WARPS, K, BLOCK, NESTED)
        scale_low, scale_high = _scales(weight, absmax, NESTED)
        scale_u_low, scale_u_high = scale_low, scale_high
        if GATED:
            scale_u_low, scale_u_high = _scales(weight_u, absmax_u, NESTED)
        for i in tl.static_range(4):
            x = _x_of(x8_ptr, other_ptr, 4 * part + i, K, SUMS, WHOLE)
            product = _product(words[2 * i], words[2 * i + 1], x, table, KIND, dtype, SUMS)
            acc = plus_scaled(acc, product, of_lane(scale_low, i), of_lane(scale_high, i), SUMS)
            if GATED:
                product = _product(words_u[2 * i], words_u[2 * i + 1], x, table, KIND, dtype, SUMS)
                acc_u = plus_scaled(acc_u, product, of_lane(scale_u_low, i), of_lane(scale_u_high, i), SUMS)
        words, absmax, words_u, absmax_u = next_words, next_absmax, next_words_u, next_absmax_u
        if not AHEAD:
            if round + 1 < ROUNDS:
                words, absmax = _held(weight, low, high, lane, part + WARPS, K, BLOCK, NESTED)
                if GATED:
                    words_u, absmax_u = _held(weight_u, low, high, lane, part + WARPS, K, BLOCK, NESTED)
    y = added_up(acc, SUMS) / FACTOR
    if GATED:
        y = silu_gate(y, added_up(acc_u, SUMS) / FACTOR)
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    store_sums(y, y_ptr, residual_ptr, b_ptr, tile * ROWS.value, rows, tokens, column, stride_y, stride_r)
