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
        sums_ptr: of the shrinking programs, `[adapters, PARTS, RANK, BLOCK_T]` fp32; SUMS copies for one token.
        counters_ptr: tell when the sums are complete.
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
    counters_ptr: Any


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


# So many counters of one event, so that programs that wait seldom read the same; and the int32 elements from one to the
# next, each in a cache line of its own.
COPIES = tl.constexpr(8)
LINE = tl.constexpr(32)
# So many copies of the sums of one token: thousands of programs read a few hundred bytes of them, and the L2 cache serves
# one request a line at a time. (Measured on an H200 with one copy: 75 us more for gate and up of 8,192 rows.)
SUMS = tl.constexpr(32)


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
def _announce(arrived_ptr):
    """Count this program. Every thread has stored its share of the sums before one of them counts it."""
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr + tl.arange(0, COPIES) * LINE, 1, sem="acq_rel", scope="gpu")


@triton.jit
def wait_for_sums(arrived_ptr, program, SHRINKING: tl.constexpr):
    """Wait for the shrinking programs. They have the first numbers of the launch, so they run already, or ran."""
    mine = arrived_ptr + program % COPIES * LINE
    while tl.atomic_add(mine, 0, sem="acquire", scope="gpu") < SHRINKING:
        pass


@triton.jit
def _factors(which, row, rank, t, tokens, members, ADAPTERS: tl.constexpr):
    """`[BLOCK_R, BLOCK_T]`: the scale of each row of A for the tokens of its adapter, and 0 for all others."""
    ok = row < rank
    scales = tl.load(pick(which, members.scales0_ptr, members.scales1_ptr, members.scales2_ptr, ADAPTERS) + row, mask=ok)
    owners = tl.load(pick(which, members.owners0_ptr, members.owners1_ptr, members.owners2_ptr, ADAPTERS) + row, mask=ok)
    token = tl.load(members.tokens_ptr + t, mask=t < tokens, other=-1)
    mine = (owners[:, None] == token[None, :]) & ok[:, None]
    return tl.where(mine, scales[:, None], 0.0)


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
        factors = _factors(which, row, rank, tl.arange(0, 1), 1, members, ADAPTERS)  # [RANK, 1]
        sums *= tl.reshape(factors, (RANK,))
    if rank > 0:
        copies = tl.arange(0, SUMS)[:, None] * (ADAPTERS * PARTS * RANK)  # [SUMS, 1]
        tl.store(lora.sums_ptr + copies + number * RANK + row[None, :], tl.broadcast_to(sums[None, :], (SUMS, RANK)))
        _announce(lora.counters_ptr)


@triton.jit
def b_of_token(which, n, rows, lora, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr):
    """Rows n of an adapter's B, `[BLOCK_N, RANK]`."""
    rank = rank_of(which, RANKS, SAME)
    column = tl.arange(0, RANK)
    b_ptr = pick(which, lora.b0_ptr, lora.b1_ptr, lora.b2_ptr, ADAPTERS)
    ok = (n < rows)[:, None] & (column < rank)[None, :]
    return tl.load(b_ptr + n.to(tl.int64)[:, None] * rank + column[None, :], mask=ok, other=0.0)


@triton.jit
def expand_token(
    which, program, b, lora, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """`s B h` for rows `b: [BLOCK_N, RANK]`, `[BLOCK_N]`; 0 for a weight without an adapter.

    The program's number says which copy of h it reads. ROOM is the power of two that holds the PARTS of h.
    """
    part = tl.arange(0, ROOM)
    copy = program % SUMS * (ADAPTERS * PARTS * RANK)
    cell = copy + (which * PARTS + part)[:, None] * RANK + tl.arange(0, RANK)[None, :]  # [ROOM, RANK]
    ok = (part < PARTS)[:, None] & (rank_of(which, RANKS, SAME) > 0)
    # .cg bypasses the L1 cache, which may hold values from before another program wrote.
    h = tl.sum(tl.load(lora.sums_ptr + cell, mask=ok, other=0.0, cache_modifier=".cg"), 0)  # [RANK]
    return tl.sum(b.to(tl.float32) * h[None, :], 1) * pick(which, lora.scale0, lora.scale1, lora.scale2, ADAPTERS)


@triton.jit
def _token_tile(pointers, ok, k, end, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """x from column k on, transposed: `[BLOCK_K, BLOCK_T]`."""
    if EVEN:
        return tl.trans(tl.load(pointers + k, mask=ok[:, None], other=0.0))
    column = k + tl.arange(0, BLOCK_K)
    return tl.trans(tl.load(pointers + k, mask=ok[:, None] & (column < end)[None, :], other=0.0))


@triton.jit
def shrink_tokens(
    number, x_ptr, tokens, stride_x, lora, members,
    K: tl.constexpr, ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_R, BLOCK_T]` sums of one A times `x: [tokens, K]`, over PART columns."""
    which = number // (PARTS * (RANK // BLOCK_R))
    part = number % (PARTS * (RANK // BLOCK_R)) // (RANK // BLOCK_R)
    rank = rank_of(which, RANKS, SAME)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    begin = part * PART
    end = tl.minimum(begin + PART, K)
    row = number % (RANK // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    inner = tl.arange(0, BLOCK_K)[None, :]
    a_ptr = pick(which, lora.a0_ptr, lora.a1_ptr, lora.a2_ptr, ADAPTERS) + row[:, None] * K + inner  # [BLOCK_R, BLOCK_K]
    x_tile_ptr = x_ptr + t[:, None] * stride_x + inner  # [BLOCK_T, BLOCK_K]
    ok_r = row < rank
    ok_t = t < tokens
    if OVERLAP and not SETTLED:
        gdc_wait()
    a_first = _a_tile(a_ptr, ok_r, begin, end, EVEN, BLOCK_K)
    if OVERLAP and SETTLED:
        gdc_wait()
    # PEFT casts x to the dtype of A.
    x = _token_tile(x_tile_ptr, ok_t, begin, end, EVEN, BLOCK_K).to(a_first.dtype)  # [BLOCK_K, BLOCK_T]
    sums = tl.dot(a_first, x, input_precision=PRECISION)
    for k in tl.range(begin + BLOCK_K, end, BLOCK_K, num_stages=3):
        a = _a_tile(a_ptr, ok_r, k, end, EVEN, BLOCK_K)
        x = _token_tile(x_tile_ptr, ok_t, k, end, EVEN, BLOCK_K).to(a.dtype)
        # Added, not chained: the sums of parts and of tiles stay short where the matrix unit is not used.
        sums += tl.dot(a, x, input_precision=PRECISION)
    if members is not None:
        sums *= _factors(which, row, rank, t, tokens, members, ADAPTERS)
    if rank > 0:
        sums_ptr = lora.sums_ptr + (which * PARTS + part) * (RANK * BLOCK_T)
        tl.store(sums_ptr + row[:, None] * BLOCK_T + t[None, :], sums)
        _announce(lora.counters_ptr)


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
def expand_tokens(
    acc, which, b, n, rows, lora,
    ADAPTERS: tl.constexpr, RANKS: tl.constexpr, SAME: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + s B h`, `[BLOCK_N, BLOCK_T]`; `b: [BLOCK_N, COLUMNS]` holds the first columns of B."""
    COLUMNS: tl.constexpr = b.shape[1]
    if rank_of(which, RANKS, SAME) > 0:
        row = tl.arange(0, COLUMNS)[:, None]
        delta = tl.zeros(acc.shape, tl.float32)
        # Not unrolled: the loads of all columns at once would need all registers.
        for first in tl.range(0, RANK, COLUMNS, num_stages=1):
            h = tl.zeros([COLUMNS, BLOCK_T], tl.float32)
            for part in tl.static_range(PARTS):
                cell = ((which * PARTS + part) * RANK + first + row) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
                # .cg bypasses the L1 cache, which may hold values from before another program wrote.
                h += tl.load(lora.sums_ptr + cell, cache_modifier=".cg")
            delta += tl.dot(b.to(tl.float32), h, input_precision=PRECISION)
            if RANK > COLUMNS:
                b = b_of_tokens(which, n, rows, first + COLUMNS, lora, ADAPTERS, RANKS, SAME, COLUMNS)
        acc += delta * pick(which, lora.scale0, lora.scale1, lora.scale2, ADAPTERS)
    return acc
