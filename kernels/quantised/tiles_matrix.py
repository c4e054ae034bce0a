"""Triton: products of 1 to 8 tokens with weights in tinygemm's tiles, on the matrix unit."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.quantised.codes_matrix import _added_up, _store, _zeros, two_words
from hf_fastattn.kernels.quantised.fragments import tile_assembly

PRODUCT, SUM = (tl.constexpr(tile_assembly(1, ones)) for ones in (False, True))
PRODUCT_CONSTRAINTS = tl.constexpr("=&f,=&f,=&f,=&f,l,l,l,l" + ",r" * 16)
SUM_CONSTRAINTS = tl.constexpr("=&f,=&f,=&f,=&f" + ",r" * 16)


class TilePointers(NamedTuple):
    """What a kernel reads of a weight."""

    words_ptr: Any
    scales_ptr: Any


@triton.jit
def _words(p, q, at):
    a, b = two_words(p + at, True)
    c, d = two_words(q + at, True)
    return a, b, c, d


@triton.jit
def _tile(acc, w, scale_low, scale_high, x, sums, ONE: tl.constexpr):
    c0, c1, c2, c3 = tl.inline_asm_elementwise(
        PRODUCT, PRODUCT_CONSTRAINTS,
        [w[0], w[1], w[2], w[3], x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )
    s = (scale_low << 16).to(tl.float32, bitcast=True)
    z = (scale_low & -65536).to(tl.float32, bitcast=True) - 136.0 * s
    s_h = (scale_high << 16).to(tl.float32, bitcast=True)
    z_h = (scale_high & -65536).to(tl.float32, bitcast=True) - 136.0 * s_h
    if ONE:
        found = (acc[0] + (c0 * s + sums[0] * z), acc[1] + (c2 * s_h + sums[0] * z_h))
    else:
        found = (
            acc[0] + (c0 * s + sums[0] * z), acc[1] + (c1 * s + sums[1] * z),
            acc[2] + (c2 * s_h + sums[0] * z_h), acc[3] + (c3 * s_h + sums[1] * z_h),
        )
    return found


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def tiles_matrix_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, tokens, n0, n1, n2, stride_x, stride_y, stride_r,
    K: tl.constexpr, GROUP: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr, TILES: tl.constexpr,
    SETTLED: tl.constexpr, OVERLAP: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    THREADS: tl.constexpr = 32 * WARPS
    PARTS: tl.constexpr = K // 128
    OWN: tl.constexpr = 16 if GATED else 16 * TILES
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, OWN, WEIGHTS)
    tid = tl.arange(0, THREADS)
    lane = tid % 32
    g = lane // 4
    t = tid % 4
    warp = tid // 32
    if OVERLAP and not SETTLED:
        gdc_wait()
    words_ptr = pick(which, w0.words_ptr, w1.words_ptr, w2.words_ptr, WEIGHTS)
    scales_ptr = pick(which, w0.scales_ptr, w1.scales_ptr, w2.scales_ptr, WEIGHTS)
    height = (rows + 7) // 8
    i0 = tl.minimum(tile * (OWN // 8), height - 1)
    i1 = tl.minimum(tile * (OWN // 8) + 1, height - 1)
    p0 = words_ptr + (i0.to(tl.int64) * PARTS + warp) * 64 + lane * 2
    p1 = words_ptr + (i1.to(tl.int64) * PARTS + warp) * 64 + lane * 2
    if TILES == 2:
        if GATED:
            words_u_ptr, scales_u_ptr = w1.words_ptr, w1.scales_ptr
            i2, i3 = i0, i1
        else:
            words_u_ptr, scales_u_ptr = words_ptr, scales_ptr
            i2 = tl.minimum(tile * (OWN // 8) + 2, height - 1)
            i3 = tl.minimum(tile * (OWN // 8) + 3, height - 1)
        p2 = words_u_ptr + (i2.to(tl.int64) * PARTS + warp) * 64 + lane * 2
        p3 = words_u_ptr + (i3.to(tl.int64) * PARTS + warp) * 64 + lane * 2
    w = _words(p0, p1, 0)
    if TILES == 2:
        u = _words(p2, p3, 0)
    if OVERLAP and SETTLED:
        gdc_wait()
    x2_ptr = x_ptr.to(tl.pointer_type(tl.int32)) + (0 if ONE else g * (stride_x // 2)) + t
    acc = _zeros(THREADS, ONE, 1)
    acc_u = acc
    # The leading dimension of the scales is that of whole groups.
    for round in tl.range(0, PARTS // WARPS, num_stages=1):
        part = round * WARPS + warp
        at = (part * 128 // GROUP) * (8 * height) + g
        s0 = tl.load(scales_ptr + at + 8 * i0)
        s1 = tl.load(scales_ptr + at + 8 * i1)
        if TILES == 2:
            s2 = tl.load(scales_u_ptr + at + 8 * i2)
            s3 = tl.load(scales_u_ptr + at + 8 * i3)
        xp = x2_ptr + part * 64
        x = (
            tl.load(xp), tl.load(xp + 4), tl.load(xp + 8), tl.load(xp + 12), tl.load(xp + 16), tl.load(xp + 20), tl.load(xp + 24), tl.load(xp + 28),
            tl.load(xp + 32), tl.load(xp + 36), tl.load(xp + 40), tl.load(xp + 44), tl.load(xp + 48), tl.load(xp + 52), tl.load(xp + 56), tl.load(xp + 60),
        )
        if round + 1 < PARTS // WARPS:
            next_w = _words(p0, p1, (round + 1) * WARPS * 64)
            if TILES == 2:
                next_u = _words(p2, p3, (round + 1) * WARPS * 64)
        else:
            next_w = w
            if TILES == 2:
                next_u = u
        sums = tl.inline_asm_elementwise(
            SUM, SUM_CONSTRAINTS, [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )
        acc = _tile(acc, w, s0, s1, x, sums, ONE)
        w = next_w
        if TILES == 2:
            acc_u = _tile(acc_u, u, s2, s3, x, sums, ONE)
            u = next_u
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    y = _added_up(acc, ONE, 1)
    if GATED:
        y = silu_gate(y, _added_up(acc_u, ONE, 1))
    _store(y, y_ptr, residual_ptr, b_ptr, tile * OWN, rows, tokens, column, stride_y, stride_r, ONE, 1)
    if TILES == 2 and not GATED:
        _store(_added_up(acc_u, ONE, 1), y_ptr, residual_ptr, b_ptr, tile * OWN + 16, rows, tokens, column, stride_y, stride_r, ONE, 1)
