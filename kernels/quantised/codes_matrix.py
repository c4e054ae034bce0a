"""Triton: products of 1 to 16 tokens with weights of 4-bit codes (bitsandbytes), on the matrix unit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.eight_bits import ASSEMBLY
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.quantised.codes_row import pick_codes
from hf_fastattn.kernels.quantised.fragments import codes_assembly, permuted_assembly, table_assembly
from hf_fastattn.kernels.quantised.nibbles import MATRIX, _compared, block_scales, matrix_bits

BF16, FP16 = torch.bfloat16, torch.float16
NF4, FP4 = "nf4", "fp4"
TABLES = tl.constexpr({
    f"{kind} {name} {entries}": table_assembly(matrix_bits(kind, dtype), entries)
    for kind in ("nf4", "fp4") for name, dtype in (("bf16", BF16), ("fp16", FP16)) for entries in (1, 2, 4)
})
PRODUCTS = tl.constexpr({f"{name} {groups}": codes_assembly(form, groups) for name, form in (("bf16", "bf16"), ("fp16", "f16")) for groups in (1, 2)})
PERMUTED = tl.constexpr({f"bf16 {groups}": permuted_assembly("bf16", groups, matrix_bits("nf4", BF16)) for groups in (1, 2)})
SHUFFLED = tl.constexpr([f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1c1f, 0xffffffff;" for lane in range(4)])


@triton.jit
def _table(tid, THREADS: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr):
    ENTRIES: tl.constexpr = 256 // THREADS if THREADS < 256 else 1
    return tl.inline_asm_elementwise(
        TABLES.value[f"{KIND} {dtype} {ENTRIES}"], "=&r,r,r,r", [tid & 255, tid & 31, tl.full(tid.shape, THREADS, tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def _of_lane(x, LANE: tl.constexpr):
    """x of lane number LANE of the four that share rows."""
    if ASSEMBLY:
        found = tl.inline_asm_elementwise(SHUFFLED.value[LANE], "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:
        four = tl.reshape(x, (x.shape[0] // 4, 4))
        column = tl.arange(0, 4)[None, :]
        found = tl.sum(tl.where(column == LANE, four, 0.0), 1)
        found = tl.reshape(tl.broadcast_to(found[:, None], (x.shape[0] // 4, 4)), x.shape)
    return found


@triton.jit
def _words(low_ptr, high_ptr, at):
    """Codes of four blocks of rows g and g + 8."""
    return (
        tl.load(low_ptr + at, eviction_policy="evict_first"), tl.load(high_ptr + at, eviction_policy="evict_first"),
        tl.load(low_ptr + at + 4, eviction_policy="evict_first"), tl.load(high_ptr + at + 4, eviction_policy="evict_first"),
        tl.load(low_ptr + at + 8, eviction_policy="evict_first"), tl.load(high_ptr + at + 8, eviction_policy="evict_first"),
        tl.load(low_ptr + at + 12, eviction_policy="evict_first"), tl.load(high_ptr + at + 12, eviction_policy="evict_first"),
    )


@triton.jit
def _one_group(low, high, x, table, dtype: tl.constexpr, PERM: tl.constexpr):
    return tl.inline_asm_elementwise(
        PERMUTED.value[f"{dtype} 1"] if PERM else PRODUCTS.value[f"{dtype} 1"], "=&f,=&f,=&f,=&f,l,l,l,l,l,l,r", [low, high, x[0], x[1], x[2], x[3], table],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )


@triton.jit
def _two_groups(low, high, x, table, dtype: tl.constexpr, PERM: tl.constexpr):
    return tl.inline_asm_elementwise(
        PERMUTED.value[f"{dtype} 2"] if PERM else PRODUCTS.value[f"{dtype} 2"], "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,l,l,l,l,l,l,l,l,l,l,r",
        [low, high, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], table],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False, pack=1,
    )


WIDE = tl.constexpr("ld.global.v2.b64 {$0, $1}, [$2];")
WIDE_ONCE = tl.constexpr("ld.global.L1::evict_first.v2.b64 {$0, $1}, [$2];")


@triton.jit
def two_words(pointers, ONCE: tl.constexpr):
    """Two int64 side by side, at addresses of whole 16 bytes."""
    if ASSEMBLY:
        first, second = tl.inline_asm_elementwise(
            WIDE_ONCE if ONCE else WIDE, "=l,=l,l", [pointers.to(tl.int64)], dtype=(tl.int64, tl.int64), is_pure=False, pack=1
        )
    else:
        first, second = tl.load(pointers), tl.load(pointers + 1)
    return first, second


@triton.jit
def _x_of(x_ptr, at, GROUPS: tl.constexpr, stride_x):
    p = x_ptr + at
    a, b = two_words(p, False)
    c, d = two_words(p + 2, False)
    found = (a, b, c, d)
    if GROUPS == 2:
        q = p + 8 * (stride_x // 4)
        e, f = two_words(q, False)
        h, i = two_words(q + 2, False)
        found = (a, b, c, d, e, f, h, i)
    return found


@triton.jit
def _block(acc, low, high, x, s_low, s_high, table, ONE: tl.constexpr, GROUPS: tl.constexpr, dtype: tl.constexpr, PERM: tl.constexpr):
    if ONE:
        c0, c1, c2, c3 = _one_group(low, high, x, table, dtype, PERM)
        found = (acc[0] + c0 * s_low, acc[1] + c2 * s_high)
    elif GROUPS == 1:
        c0, c1, c2, c3 = _one_group(low, high, x, table, dtype, PERM)
        found = (acc[0] + c0 * s_low, acc[1] + c1 * s_low, acc[2] + c2 * s_high, acc[3] + c3 * s_high)
    else:
        c0, c1, c2, c3, d0, d1, d2, d3 = _two_groups(low, high, x, table, dtype, PERM)
        found = (
            acc[0] + c0 * s_low, acc[1] + c1 * s_low, acc[2] + c2 * s_high, acc[3] + c3 * s_high,
            acc[4] + d0 * s_low, acc[5] + d1 * s_low, acc[6] + d2 * s_high, acc[7] + d3 * s_high,
        )
    return found


@triton.jit
def _zeros(THREADS: tl.constexpr, ONE: tl.constexpr, GROUPS: tl.constexpr):
    z = tl.zeros([THREADS], tl.float32)
    if ONE:
        found = (z, z)
    elif GROUPS == 1:
        found = (z, z, z, z)
    else:
        found = (z, z, z, z, z, z, z, z)
    return found


@triton.jit
def _added_up(acc, ONE: tl.constexpr, GROUPS: tl.constexpr):
    """`[32, sums]`."""
    W: tl.constexpr = acc[0].shape[0] // 32
    if ONE:
        all = tl.reshape(tl.join(acc[0], acc[1]), (W, 32, 2))
    elif GROUPS == 1:
        all = tl.reshape(tl.join(tl.join(acc[0], acc[2]), tl.join(acc[1], acc[3])), (W, 32, 4))
    else:
        first = tl.join(tl.join(acc[0], acc[2]), tl.join(acc[1], acc[3]))
        all = tl.reshape(tl.join(first, tl.join(tl.join(acc[4], acc[6]), tl.join(acc[5], acc[7]))), (W, 32, 8))
    return tl.sum(all, 0)


@triton.jit
def _store(y, y_ptr, residual_ptr, b_ptr, first, rows, tokens, column, stride_y, stride_r, ONE: tl.constexpr, GROUPS: tl.constexpr):
    Q: tl.constexpr = y.shape[1]
    lane = tl.arange(0, 32)[:, None]
    q = tl.arange(0, Q)[None, :]
    if ONE:
        half, token = q, 2 * (lane % 4) + 0 * q
    elif GROUPS == 1:
        half, token = q // 2, 2 * (lane % 4) + q % 2
    else:
        half, token = q // 4, 2 * (lane % 4) + q // 2 % 2 + 8 * (q % 2)
    n = first + lane // 4 + 8 * half
    ok = (n < rows) & (token < tokens)
    if b_ptr is not None:
        y += tl.load(b_ptr + n, mask=ok, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + token * stride_r + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * stride_y + column + n, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def codes_matrix_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, tokens, n0, n1, n2, stride_x, stride_y, stride_r,
    K: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr, FACTOR: tl.constexpr,
    WEIGHTS: tl.constexpr, GATED: tl.constexpr, ONE: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr, PERM: tl.constexpr,
    SETTLED: tl.constexpr, OVERLAP: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
    THREADS: tl.constexpr = 32 * WARPS
    BLOCKS: tl.constexpr = K // BLOCK
    ROUNDS: tl.constexpr = (K // 256 + WARPS - 1) // WARPS
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    OWN: tl.constexpr = 16 if GATED else 16 * TILES
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, OWN, WEIGHTS)
    tid = tl.arange(0, THREADS)
    g = tid % 32 // 4
    t = tid % 4
    warp = tid // 32
    if OVERLAP and not SETTLED:
        gdc_wait()
    codes_ptr, absmax_ptr, nested_ptr, levels_ptr, offset = pick_codes(which, w0, w1, w2, WEIGHTS, NESTED)
    r0 = tl.minimum(tile * OWN + g, rows - 1).to(tl.int64)
    r1 = tl.minimum(tile * OWN + g + 8, rows - 1).to(tl.int64)
    p0 = codes_ptr + r0 * (K // 16) + t
    p1 = codes_ptr + r1 * (K // 16) + t
    if TILES == 2:
        if GATED:
            codes_u_ptr, absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u = pick_codes(1, w0, w1, w2, 2, NESTED)
            r2, r3 = r0, r1
        else:
            codes_u_ptr, absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u = codes_ptr, absmax_ptr, nested_ptr, levels_ptr, offset
            r2 = tl.minimum(tile * OWN + g + 16, rows - 1).to(tl.int64)
            r3 = tl.minimum(tile * OWN + g + 24, rows - 1).to(tl.int64)
        p2 = codes_u_ptr + r2 * (K // 16) + t
        p3 = codes_u_ptr + r3 * (K // 16) + t
    WHOLE: tl.constexpr = K % (256 * WARPS) == 0
    LAST: tl.constexpr = K // 256 - 1
    at = warp
    w = _words(p0, p1, 16 * tl.minimum(at, LAST))
    u = w
    if TILES == 2:
        u = _words(p2, p3, 16 * tl.minimum(at, LAST))
    b = (256 * tl.minimum(at, LAST) + 64 * t) // BLOCK
    s0 = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, r0, b, BLOCKS, NESTED)
    s1 = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, r1, b, BLOCKS, NESTED)
    s2, s3 = s0, s1
    if TILES == 2:
        s2 = block_scales(absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, r2, b, BLOCKS, NESTED)
        s3 = block_scales(absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, r3, b, BLOCKS, NESTED)
    if PERM:
        table = tid
    else:
        table = _table(tid, THREADS, KIND, dtype)
        tl.debug_barrier()
    if OVERLAP and SETTLED:
        gdc_wait()
    x4_ptr = x_ptr.to(tl.pointer_type(tl.int64)) + (0 if ONE else g * (stride_x // 4)) + 4 * t
    acc = _zeros(THREADS, ONE, GROUPS)
    acc_u = acc
    for round in tl.range(0, ROUNDS, num_stages=1):
        if not WHOLE:
            inside = tl.where(at <= LAST, 1.0, 0.0)
            s0 *= inside
            s1 *= inside
            if TILES == 2:
                s2 *= inside
                s3 *= inside
        here = tl.minimum(at, LAST)
        at += WARPS
        nw, nu, n0_, n1_, n2_, n3_ = w, u, s0, s1, s2, s3
        if AHEAD:
            if round + 1 < ROUNDS:
                there = tl.minimum(at, LAST)
                b = (256 * there + 64 * t) // BLOCK
                n0_ = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, r0, b, BLOCKS, NESTED)
                n1_ = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, r1, b, BLOCKS, NESTED)
                if TILES == 2:
                    n2_ = block_scales(absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, r2, b, BLOCKS, NESTED)
                    n3_ = block_scales(absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, r3, b, BLOCKS, NESTED)
                nw = _words(p0, p1, 16 * there)
                if TILES == 2:
                    nu = _words(p2, p3, 16 * there)
        for i in tl.static_range(4):
            x = _x_of(x4_ptr, here * 64 + 16 * i, GROUPS, stride_x)
            acc = _block(acc, w[2 * i], w[2 * i + 1], x, _of_lane(s0, i), _of_lane(s1, i), table, ONE, GROUPS, dtype, PERM)
            if TILES == 2:
                acc_u = _block(acc_u, u[2 * i], u[2 * i + 1], x, _of_lane(s2, i), _of_lane(s3, i), table, ONE, GROUPS, dtype, PERM)
        w, u, s0, s1, s2, s3 = nw, nu, n0_, n1_, n2_, n3_
        if not AHEAD:
            if round + 1 < ROUNDS:
                here = tl.minimum(at, LAST)
                w = _words(p0, p1, 16 * here)
                if TILES == 2:
                    u = _words(p2, p3, 16 * here)
                b = (256 * here + 64 * t) // BLOCK
                s0 = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, r0, b, BLOCKS, NESTED)
                s1 = block_scales(absmax_ptr, nested_ptr, levels_ptr, offset, r1, b, BLOCKS, NESTED)
                if TILES == 2:
                    s2 = block_scales(absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, r2, b, BLOCKS, NESTED)
                    s3 = block_scales(absmax_u_ptr, nested_u_ptr, levels_u_ptr, offset_u, r3, b, BLOCKS, NESTED)
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    y = _added_up(acc, ONE, GROUPS) / FACTOR
    if GATED:
        y = silu_gate(y, _added_up(acc_u, ONE, GROUPS) / FACTOR)
    _store(y, y_ptr, residual_ptr, b_ptr, tile * OWN, rows, tokens, column, stride_y, stride_r, ONE, GROUPS)
    if TILES == 2 and not GATED:
        y = _added_up(acc_u, ONE, GROUPS) / FACTOR
        _store(y, y_ptr, residual_ptr, b_ptr, tile * OWN + 16, rows, tokens, column, stride_y, stride_r, ONE, GROUPS)
