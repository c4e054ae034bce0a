"""What the programs of a product do for LoRA: the first ones of the launch shrink, the others expand (see `lora.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from hf_fastattn.kernels.layer.tiles import pick


class Operands(NamedTuple):
    """The tensors of a launch with adapters, as its programs take them.

    Attributes:
        a0_ptr: A of the first adapter; one that is missing has another's, and the rank 0. Likewise B and the scales.
        sums_ptr: of the shrinking programs, `[adapters, PARTS, RANK, BLOCK_T]` fp32 as int32, each MISSING until it is
            there; SUMS copies for one token.
    """

    a0_ptr: Any
    a1_ptr: Any
    a2_ptr: Any
    b0_ptr: Any
    b1_ptr: Any
    b2_ptr: Any
    scale0: float
    scale1: float
    scale2: float
    sums_ptr: Any


class MemberPointers(NamedTuple):
    """Whose the rows of A are where adapters are stacked, as the shrinking programs take it.

    Attributes:
        scales0_ptr: of the rows of the first A, fp32; likewise the numbers of the adapters that they belong to, int32.
        tokens_ptr: the number of each token's adapter, int32.
    """

    scales0_ptr: Any
    scales1_ptr: Any
    scales2_ptr: Any
    owners0_ptr: Any
    owners1_ptr: Any
    owners2_ptr: Any
    tokens_ptr: Any


# The bits of a sum that is not there yet: a NaN that no arithmetic makes, whose NaNs are 0x7fffffff. So a sum is its own
# flag, and whoever reads it needs no second trip to the L2 cache for one.
MISSING = tl.constexpr(-0x3F2153)
# So many copies of the sums of one token: thousands of programs read a few hundred bytes of them, and the L2 cache serves
# one request a line at a time. (Measured on an H200 with one copy: 75 us more for gate and up of 8,192 rows.)
SUMS = tl.constexpr(32)


# Columns of a step are divided among so many warps, as many as the programs have: one chain of products would be long.
SEGMENTS = tl.constexpr(4)


@triton.jit
def rank_of(which, RANKS: tl.constexpr, SAME: tl.constexpr):
    """The rank of an adapter; known to the compiler, for wide loads of B, where all have the same."""
    if SAME:
        return RANKS[0]
    return tl.where(which == 0, RANKS[0], tl.where(which == 1, RANKS[1], RANKS[2]))


@triton.jit
def _a_tile(pointers, ok, k, end, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of rows of A, BLOCK_K columns from column k on; rows from the rank on are zero."""
    if EVEN:
        return tl.load(pointers + k, mask=ok[:, None], other=0.0)
    column = k + tl.arange(0, BLOCK_K)
    return tl.load(pointers + k, mask=ok[:, None] & (column < end)[None, :], other=0.0)


@triton.jit
def _bits(sums):
    """What is stored of sums; never MISSING, whatever NaN a device makes."""
    bits = sums.to(tl.int32, bitcast=True)
    return tl.where(bits == MISSING, 0x7FFFFFFF, bits)


@triton.jit
def _own(sums, which, row, rank, t, tokens, members, ADAPTERS: tl.constexpr):
    """`sums: [BLOCK_R, BLOCK_T]` times the scale of each row of A for the tokens of its adapter, and 0 for all others."""
    ok = row < rank
    scales = tl.load(pick(which, members.scales0_ptr, members.scales1_ptr, members.scales2_ptr, ADAPTERS) + row, mask=ok)
    owners = tl.load(pick(which, members.owners0_ptr, members.owners1_ptr, members.owners2_ptr, ADAPTERS) + row, mask=ok)
    token = tl.load(members.tokens_ptr + t, mask=t < tokens, other=-1)
    mine = (owners[:, None] == token[None, :]) & ok[:, None]
    return tl.where(mine, sums * scales[:, None], 0.0)


@triton.jit
def shrink_token(
    number, x_ptr, lora, members,
    K: tl.constexpr, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`[RANK]` sums of one A times `x: [K]`, over PART columns."""
    which = number // PARTS
    part = number % PARTS
    rank = rank_of(which, RANKS, SAME)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    begin = part * PART
    end = tl.minimum(begin + PART, K)
    row = tl.arange(0, RANK)
    inner = tl.arange(0, BLOCK_K)
    a_ptr = (
        pick(which, lora.a0_ptr, lora.a1_ptr, lora.a2_ptr, ADAPTERS) + row[:, None] * K + inner[None, :]
    )  # [RANK, BLOCK_K]
    if OVERLAP and not SETTLED:
        gdc_wait()
    a = _a_tile(a_ptr, row < rank, begin, end, EVEN, BLOCK_K)
    if OVERLAP and SETTLED:
        gdc_wait()
    sums = tl.zeros([RANK], tl.float32)
    for k in tl.range(begin, end, BLOCK_K):
        # PEFT casts x to the dtype of A.
        x = tl.load(x_ptr + k + inner, mask=k + inner < end, other=0.0).to(a.dtype)  # [BLOCK_K]
        sums += tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        a = _a_tile(a_ptr, (row < rank) & (k + BLOCK_K < end), k + BLOCK_K, end, EVEN, BLOCK_K)
    if members is not None:
        sums = tl.reshape(_own(sums[:, None], which, row, rank, tl.arange(0, 1), 1, members, ADAPTERS), (RANK,))
    if rank > 0:
        copies = tl.arange(0, SUMS)[:, None] * (ADAPTERS * PARTS * RANK)  # [SUMS, 1]
        tl.store(lora.sums_ptr + copies + number * RANK + row[None, :], tl.broadcast_to(_bits(sums)[None, :], (SUMS, RANK)))


@triton.jit
def b_of_token(which, n, rows, lora, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr):
    """Rows n of an adapter's B, `[BLOCK_N, RANK]`."""
    rank = rank_of(which, RANKS, SAME)
    column = tl.arange(0, RANK)
    b_ptr = pick(which, lora.b0_ptr, lora.b1_ptr, lora.b2_ptr, ADAPTERS)
    ok = (n < rows)[:, None] & (column < rank)[None, :]
    return tl.load(b_ptr + n.to(tl.int64)[:, None] * rank + column[None, :], mask=ok, other=0.0)


@triton.jit
def _sums_of_token(
    which, program, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Where an adapter's sums are, `[ROOM, RANK]`, and which of them there will be. The program says which copy."""
    part = tl.arange(0, ROOM)
    copy = program % SUMS * (ADAPTERS * PARTS * RANK)
    cell = copy + (which * PARTS + part)[:, None] * RANK + tl.arange(0, RANK)[None, :]
    return cell, (part < PARTS)[:, None] & (rank_of(which, RANKS, SAME) > 0)


@triton.jit
def early_sums(
    which, program, lora, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The bits of an adapter's sums as they are now, some perhaps MISSING: `[ROOM, RANK]`."""
    cell, ok = _sums_of_token(which, program, ADAPTERS, RANKS, SAME, RANK, PARTS, ROOM)
    return tl.load(lora.sums_ptr + cell, mask=ok, other=0, volatile=True)


@triton.jit
def expand_token(
    which, program, b, bits, lora, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """`s B h` for rows `b: [BLOCK_N, RANK]`, `[BLOCK_N]`; 0 for a weight without an adapter.

    The parts of h are read again until those that were MISSING in `bits`, of `early_sums`, are there: the programs that
    store them have the first numbers of the launch, so they run already, or ran. ROOM is the power of two that holds
    the PARTS.
    """
    cell, ok = _sums_of_token(which, program, ADAPTERS, RANKS, SAME, RANK, PARTS, ROOM)
    while tl.sum((bits == MISSING).to(tl.int32)) > 0:
        bits = tl.load(lora.sums_ptr + cell, mask=ok, other=0, volatile=True)
    h = tl.sum(bits.to(tl.float32, bitcast=True), 0)  # [RANK]
    return tl.sum(b.to(tl.float32) * h[None, :], 1) * pick(which, lora.scale0, lora.scale1, lora.scale2, ADAPTERS)


@triton.jit
def _columns(pointers, ok, k, end, EVEN: tl.constexpr):
    """`[SEGMENTS, rows, BLOCK_K]` elements from column k on; segments are neighbours."""
    if EVEN:
        return tl.load(pointers + k, mask=ok[None, :, None], other=0.0)
    BLOCK_K: tl.constexpr = pointers.shape[2]
    column = k + tl.arange(0, SEGMENTS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    return tl.load(pointers + k, mask=ok[None, :, None] & (column < end), other=0.0)


@triton.jit
def _add_shrunk(sums, a, x, PRECISION: tl.constexpr):
    """`sums + a x^T` of `a: [SEGMENTS, R, BLOCK_K]` and `x: [SEGMENTS, T, BLOCK_K]`, in the dtype of a, as PEFT casts x."""
    x = tl.trans(x, 0, 2, 1)
    if a.dtype == tl.float32 and x.dtype == tl.bfloat16:
        # fp32 is the sum of three in bf16; their products with x are exact, and take no conversion of x.
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return sums + (tl.dot(low, x) + tl.dot(middle, x) + tl.dot(high, x))
    # Added, not chained: the sums of parts and of tiles stay short where the matrix unit is not used.
    return sums + tl.dot(a, x.to(a.dtype), input_precision=PRECISION)


@triton.jit
def shrink_tokens(
    number, x_ptr, tokens, stride_x, lora, members,
    K: tl.constexpr, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_R, BLOCK_T]` sums of one A times `x: [tokens, K]`, over PART columns; each warp takes a segment of a step."""
    which = number // (PARTS * (RANK // BLOCK_R))
    part = number % (PARTS * (RANK // BLOCK_R)) // (RANK // BLOCK_R)
    rank = rank_of(which, RANKS, SAME)
    STEP: tl.constexpr = SEGMENTS * BLOCK_K
    EVEN: tl.constexpr = K // STEP * STEP == K
    begin = part * PART
    end = tl.minimum(begin + PART, K)
    row = number % (RANK // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    inner = tl.arange(0, SEGMENTS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    a_ptr = pick(which, lora.a0_ptr, lora.a1_ptr, lora.a2_ptr, ADAPTERS) + row[None, :, None] * K + inner
    x_tile_ptr = x_ptr + t[None, :, None] * stride_x + inner  # [SEGMENTS, BLOCK_T, BLOCK_K]
    ok_r = row < rank
    ok_t = t < tokens
    if OVERLAP and not SETTLED:
        gdc_wait()
    a = _columns(a_ptr, ok_r, begin, end, EVEN)  # [SEGMENTS, BLOCK_R, BLOCK_K]
    if OVERLAP and SETTLED:
        gdc_wait()
    sums = tl.zeros([SEGMENTS, BLOCK_R, BLOCK_T], tl.float32)
    for k in tl.range(begin, end, STEP):
        x = _columns(x_tile_ptr, ok_t, k, end, EVEN)
        ahead = _columns(a_ptr, ok_r & (k + STEP < end), k + STEP, end, EVEN)
        sums = _add_shrunk(sums, a, x, PRECISION)
        a = ahead
    if rank > 0:
        sums_ptr = lora.sums_ptr + (which * PARTS + part) * (RANK * BLOCK_T)
        whole = tl.sum(sums, 0)
        if members is not None:
            whole = _own(whole, which, row, rank, t, tokens, members, ADAPTERS)
        tl.store(sums_ptr + row[:, None] * BLOCK_T + t[None, :], _bits(whole))


@triton.jit
def b_of_tokens(
    which, n, rows, first, lora, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, COLUMNS: tl.constexpr
):
    """Rows n of an adapter's B, from column `first` on: `[BLOCK_N, COLUMNS]`."""
    rank = rank_of(which, RANKS, SAME)
    column = first + tl.arange(0, COLUMNS)
    b_ptr = pick(which, lora.b0_ptr, lora.b1_ptr, lora.b2_ptr, ADAPTERS)
    ok = (n < rows)[:, None] & (column < rank)[None, :]
    return tl.load(b_ptr + n.to(tl.int64)[:, None] * rank + column[None, :], mask=ok, other=0.0)


@triton.jit
def sums_of_tokens(
    which, first, tokens, lora, RANK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr
):
    """h from row `first` on as it is now, `[COLUMNS, BLOCK_T]`, and how many of its parts are not there, of each."""
    t = tl.arange(0, BLOCK_T)[None, :]
    cell = (which * (PARTS * RANK) + first + tl.arange(0, COLUMNS))[:, None] * BLOCK_T + t
    h = tl.zeros([COLUMNS, BLOCK_T], tl.float32)
    lacks = tl.zeros([COLUMNS, BLOCK_T], tl.int32)
    for part in tl.static_range(PARTS):
        # Padding tokens, up to half of them, cost no request.
        bits = tl.load(lora.sums_ptr + part * (RANK * BLOCK_T) + cell, mask=t < tokens, other=0, volatile=True)
        lacks += (bits == MISSING).to(tl.int32)
        h += bits.to(tl.float32, bitcast=True)
    return h, lacks


@triton.jit
def _awaited(
    h, lacks, which, first, tokens, lora,
    RANK: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """h of `sums_of_tokens`, read again until all parts are there."""
    missing = tl.sum(lacks)
    while missing > 0:
        h, still = sums_of_tokens(which, first, tokens, lora, RANK, PARTS, COLUMNS, BLOCK_T)
        missing = tl.sum(still)
    return h


@triton.jit
def expand_held(
    acc, which, b, h, lacks, tokens, lora,
    ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + s B h`, `[BLOCK_N, BLOCK_T]`, of all of B, which was loaded early, and of h and what it lacked then."""
    if rank_of(which, RANKS, SAME) > 0:
        h = _awaited(h, lacks, which, 0, tokens, lora, RANK, PARTS, RANK, BLOCK_T)
        delta = tl.dot(b.to(tl.float32), h, input_precision=PRECISION)
        acc += delta * pick(which, lora.scale0, lora.scale1, lora.scale2, ADAPTERS)
    return acc


@triton.jit
def expand_tokens(
    acc, which, n, rows, tokens, lora,
    ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + s B h`, `[BLOCK_N, BLOCK_T]`, COLUMNS of B at a time.

    The parts of h are read until all are there: the programs that store them have the first numbers of the launch, so they
    run already, or ran. They are asked for before B, whose loads take longer: the compiler waits for these at once.
    """
    if rank_of(which, RANKS, SAME) > 0:
        delta = tl.zeros(acc.shape, tl.float32)
        # Not unrolled: the loads of all columns at once would need all registers.
        for first in tl.range(0, RANK, COLUMNS, num_stages=1):
            h, lacks = sums_of_tokens(which, first, tokens, lora, RANK, PARTS, COLUMNS, BLOCK_T)
            b = b_of_tokens(which, n, rows, first, lora, ADAPTERS, RANKS, SAME, COLUMNS).to(tl.float32)
            h = _awaited(h, lacks, which, first, tokens, lora, RANK, PARTS, COLUMNS, BLOCK_T)
            delta += tl.dot(b, h, input_precision=PRECISION)
        acc += delta * pick(which, lora.scale0, lora.scale1, lora.scale2, ADAPTERS)
    return acc
