"""Triton: products of one token with weights of 4-bit codes (bitsandbytes), on the matrix unit, by programs that hold x.

As `codes_matrix.py`, whose programs each make the table of values and read x for 16 rows alone. Here as many programs as the
GPU has multiprocessors do both once, and go on from 16 rows to the next; the codes of these are on their way while sums
are added up. K is as many columns as the warps take at once, 256 each, so that a warp keeps its columns of x in registers.

A lane loads 16 bytes at once, 32 columns, for which loads touch half as many lines a byte as with 8. So the four lanes that
share rows hold two blocks of 64 columns, whose sums the matrix unit would add up before they are multiplied with their
magnitudes. But it multiplies eight tokens, and there is one: of these four, lane t gives its columns of x as token t's, and
zeros for all others. Each lane's columns have a sum of their own then.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.eight_bits import ASSEMBLY
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.quantised.code_values import (
    COLUMNS,
    PRODUCT_COLUMNS,
    ROWS,
    compared_words,
    magnitudes_of,
    read_magnitudes,
    table_of_values,
)
from hf_fastattn.kernels.quantised.codes_row import pick_codes
from hf_fastattn.kernels.quantised.fragments import FORMS, codes_assembly
from hf_fastattn.kernels.quantised.lanes import numbers_of, of_lane_across, store_rows, two_words, two_words_of_some
from hf_fastattn.kernels.quantised.nibbles import MATRIX

WIDE_PRODUCTS = tl.constexpr({name: codes_assembly(name, 1, 2) for name in FORMS})


@triton.jit
def _own_columns(x8_ptr, own):
    """32 columns of x for the lanes of `own`, zeros for others."""
    a, b = two_words_of_some(x8_ptr, own)
    c, d = two_words_of_some(x8_ptr + 2, own)
    e, f = two_words_of_some(x8_ptr + 4, own)
    g, h = two_words_of_some(x8_ptr + 6, own)
    return (a, b, c, d, e, f, g, h)


@triton.jit
def _lane_dots(first, second, x, values, dtype: tl.constexpr):
    """For the interpreter: the products of 32 columns of each lane; of lanes 0 and 1 added up in lane 0, of 2 and 3 in 1."""
    dots = tl.sum(compared_words(first, values) * numbers_of(x[0], x[1], x[2], x[3], dtype), 1)
    dots += tl.sum(compared_words(second, values) * numbers_of(x[4], x[5], x[6], x[7], dtype), 1)
    pairs = tl.sum(tl.reshape(dots, (dots.shape[0] // 4, 2, 2)), 2)
    return tl.reshape(tl.permute(tl.join(pairs, pairs * 0.0), (0, 2, 1)), (dots.shape[0],))


@triton.jit
def _wide_product(a, b, c, d, x, table, KIND: tl.constexpr, dtype: tl.constexpr):
    """The sums of 128 columns of rows g and g + 8: of the first 64 in lane 0 of four, of the rest in lane 1; else zeros."""
    if not ASSEMBLY:
        values: tl.constexpr = MATRIX.value[f"{KIND} {dtype}"]
        low, high = _lane_dots(a, b, x, values, dtype), _lane_dots(c, d, x, values, dtype)
    else:
        p, q, r, s = tl.inline_asm_elementwise(
            WIDE_PRODUCTS.value[f"{dtype}"], "=&f,=&f,=&f,=&f,l,l,l,l,l,l,l,l,l,l,l,l,r",
            [a, b, c, d, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], table],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
        low, high = p + q, r + s
    return low, high


@triton.jit
def _read_part(weight, low, high, lane, warp, K: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """Of a warp's columns of rows `low` and `high`: 16 bytes of each row in both halves, and magnitudes of 64 columns."""
    codes_ptr, _, _, _, _ = weight
    p = codes_ptr + low * (K // 16) + 16 * warp + 2 * lane
    q = codes_ptr + high * (K // 16) + 16 * warp + 2 * lane
    a, b = two_words(p, True)
    c, d = two_words(q, True)
    e, f = two_words(p + 8, True)
    g, h = two_words(q + 8, True)
    block = (COLUMNS.value // PRODUCT_COLUMNS.value) * warp + lane
    return (a, b, c, d, e, f, g, h), read_magnitudes(weight, low, high, block, K, BLOCK, NESTED)


@triton.jit
def _part_sums(words, x, x_second, scales, table, KIND: tl.constexpr, dtype: tl.constexpr):
    """The sums of a warp's columns of two rows, in two lanes of four; `scales` are of 64 columns in each of the four."""
    low, high = _wide_product(words[0], words[1], words[2], words[3], x, table, KIND, dtype)
    more_low, more_high = _wide_product(words[4], words[5], words[6], words[7], x_second, table, KIND, dtype)
    return (
        low * scales[0] + more_low * of_lane_across(scales[0]),
        high * scales[1] + more_high * of_lane_across(scales[1]),
    )


@triton.jit
def _held_sums(sums, WARPS: tl.constexpr):
    """`[8, 2]`: the sums of all columns of rows g and g + 8."""
    joined = tl.reshape(tl.join(sums[0], sums[1]), (WARPS, 8, 4, 2))
    return tl.sum(tl.sum(joined, 2), 0)


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def codes_held_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, n0, n1, n2,
    K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, FACTOR: tl.constexpr,
    WEIGHTS: tl.constexpr, GATED: tl.constexpr, WARPS: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """16 rows after 16 rows of up to three weights, or of w0 and w1 if GATED, times `x: [K]`; K is `256 * WARPS`."""
    tl.static_assert(K == COLUMNS.value * WARPS)
    if OVERLAP:
        gdc_launch_dependents()
        if not SETTLED:
            gdc_wait()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.cdiv(n0, ROWS.value)
    if WEIGHTS > 1:
        total += tl.cdiv(n1, ROWS.value)
    if WEIGHTS > 2:
        total += tl.cdiv(n2, ROWS.value)
    thread = tl.arange(0, 32 * WARPS)
    group, lane, warp = thread % 32 // 4, thread % 4, thread // 32
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, ROWS.value, WEIGHTS)
    weight = pick_codes(which, w0, w1, w2, WEIGHTS, NESTED)
    # Instead of masks: past the last row the last one is read again. Offsets in words of 8 bytes fit 32 bits.
    low = tl.minimum(tile * ROWS.value + group, rows - 1)
    high = tl.minimum(tile * ROWS.value + group + 8, rows - 1)
    words, absmax = _read_part(weight, low, high, lane, warp, K, BLOCK, NESTED)
    words_u, absmax_u = words, absmax
    if GATED:
        weight_u = pick_codes(1, w0, w1, w2, 2, NESTED)
        words_u, absmax_u = _read_part(weight_u, low, high, lane, warp, K, BLOCK, NESTED)
    # The table is made while the first codes are on their way.
    table = table_of_values(thread, KIND, dtype)
    if OVERLAP and SETTLED:
        gdc_wait()
    own = (group == lane).to(tl.int32)
    x8_ptr = x_ptr.to(tl.pointer_type(tl.int64)) + (COLUMNS.value // 4) * warp + 8 * lane
    x, x_second = _own_columns(x8_ptr, own), _own_columns(x8_ptr + COLUMNS.value // 8, own)
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        this_which, this_rows, this_column, this_tile = which, rows, column, tile
        # Past the last tile that one is read again, for nobody.
        after = tl.minimum(number + tl.num_programs(0), total - 1)
        which, rows, column, tile = find_tile(after, n0, n1, n2, ROWS.value, WEIGHTS)
        weight_next = pick_codes(which, w0, w1, w2, WEIGHTS, NESTED)
        low = tl.minimum(tile * ROWS.value + group, rows - 1)
        high = tl.minimum(tile * ROWS.value + group + 8, rows - 1)
        # Registers hold no more codes than those of one tile: the next are loaded when these are multiplied.
        sums = _part_sums(words, x, x_second, magnitudes_of(weight, absmax, NESTED), table, KIND, dtype)
        words, absmax = _read_part(weight_next, low, high, lane, warp, K, BLOCK, NESTED)
        sums_u = sums
        if GATED:
            sums_u = _part_sums(words_u, x, x_second, magnitudes_of(weight_u, absmax_u, NESTED), table, KIND, dtype)
            words_u, absmax_u = _read_part(weight_u, low, high, lane, warp, K, BLOCK, NESTED)
        y = _held_sums(sums, WARPS) / FACTOR
        if GATED:
            y = silu_gate(y, _held_sums(sums_u, WARPS) / FACTOR)
        b_ptr = b0_ptr
        if b0_ptr is not None:
            b_ptr = pick(this_which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
        n = this_tile * ROWS.value + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :]  # [8, 2]
        store_rows(y, y_ptr + this_column, residual_ptr, b_ptr, n, n < this_rows)
        weight = weight_next
