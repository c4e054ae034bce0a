"""Products of 2 to 16 tokens with their experts, on the matrix unit; an expert that several tokens chose is read once.

The tokens are padded to 16, those that did not choose an expert with zeros. What a product gives for them is thrown away,
so that NaN or infinities in its weights reach no token that did not choose it. Where the tiles of down's rows are too few
to keep the memory busy, programs share a tile, each with a part of the experts' columns; the last one to arrive
adds the parts in fixed order, so results are bitwise repeatable. Called by `few.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import weight_tile


@triton.jit
def tokens_of(chosen_ptr, expert, t, tokens, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which tokens chose the expert, and the number of that pair: both `[BLOCK_T]`."""
    k = tl.arange(0, BLOCK_K)
    pair = t[:, None] * K + k[None, :]  # [BLOCK_T, BLOCK_K]
    ok = (t < tokens)[:, None] & (k < K)[None, :]
    here = (tl.load(chosen_ptr + pair, mask=ok, other=-1) == expert).to(tl.int32)
    return tl.max(here, 1) > 0, tl.sum(here * pair, 1)


@triton.jit
def _tokens(pointers, ok, k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of the tokens from column k on, transposed: `[BLOCK, BLOCK_T]`; zeros where not ok."""
    if WIDTH % BLOCK == 0:
        return tl.trans(tl.load(pointers + k, mask=ok[:, None], other=0.0))
    column = k + tl.arange(0, BLOCK)
    return tl.trans(tl.load(pointers + k, mask=ok[:, None] & (column < WIDTH)[None, :], other=0.0))


@triton.jit
def add_product(acc, lost, w, x, PRECISION: tl.constexpr):
    """`acc + w x`; `lost` is the rounding error of the sums so far. See `layer/skinny.py`."""
    if PRECISION == "ieee":
        part = tl.dot(w, x, input_precision="ieee") - lost
        total = acc + part
        return total, (total - acc) - part
    return tl.dot(w, x, acc), lost


@triton.jit(do_not_specialize=["tokens"])
def several_gate_up_kernel(
    x_ptr, w_ptr, chosen_ptr, distinct_ptr, count_ptr, y_ptr, tokens, stride_x,
    H: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, PAIRS_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of gate and up of expert number `program_id(1)` of those that any token chose."""
    if OVERLAP:
        # In this order: the next launch starts when the router's choice is final, and may read it at once.
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(1)
    if slot >= tl.load(count_ptr):
        return
    expert = tl.load(distinct_ptr + slot)
    t = tl.arange(0, BLOCK_T)
    ok_t, pair = tokens_of(chosen_ptr, expert, t, tokens, K, PAIRS_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inner = tl.arange(0, BLOCK_K)[None, :]
    # Instead of a mask: past the last row, the last row is read again.
    gate_ptr = w_ptr + expert.to(tl.int64) * (2 * INNER * H) + tl.minimum(n, INNER - 1)[:, None] * H + inner
    up_ptr = gate_ptr + INNER * H
    x_tile_ptr = x_ptr + t[:, None] * stride_x + inner  # [BLOCK_T, BLOCK_K]
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc_up = acc
    lost = acc
    lost_up = acc
    for k in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        x = _tokens(x_tile_ptr, ok_t, k, H, BLOCK_K)
        acc, lost = add_product(acc, lost, weight_tile(gate_ptr, k, H, BLOCK_K), x, PRECISION)
        acc_up, lost_up = add_product(acc_up, lost_up, weight_tile(up_ptr, k, H, BLOCK_K), x, PRECISION)
    y = silu_gate(acc, acc_up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + pair[None, :] * INNER + n[:, None], y, mask=(n < INNER)[:, None] & ok_t[None, :])


@triton.jit
def _store(
    acc, y_ptr, residual_ptr, shared_ptr, gate_ptr, n, t, tokens, stride_r, stride_s, H: tl.constexpr
):  # fmt: skip
    """`[BLOCK_N, BLOCK_T]` sums, and what is added to them, to the rows of y."""
    ok = (n < H)[:, None] & (t < tokens)[None, :]
    if shared_ptr is not None:
        gate = tl.load(gate_ptr + t, mask=t < tokens, other=0.0)
        shared = tl.load(shared_ptr + t[None, :] * stride_s + n[:, None], mask=ok, other=0.0).to(tl.float32)
        acc += shared / (1.0 + tl.exp(-gate))[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + t[None, :] * stride_r + n[:, None], mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + t[None, :] * H + n[:, None], acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens"])
def several_down_kernel(
    states_ptr, w_ptr, chosen_ptr, weights_ptr, distinct_ptr, count_ptr, residual_ptr, shared_ptr, gate_ptr, y_ptr,
    partial_ptr, arrived_ptr, tokens, stride_r, stride_s,
    H: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, PAIRS_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of every token, summed over part `program_id(1)` of the columns of all experts that any chose."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.program_id(0)
    part = tl.program_id(1)
    count = tl.load(count_ptr)
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    begin = count * STEPS * part // SPLIT
    end = count * STEPS * (part + 1) // SPLIT
    t = tl.arange(0, BLOCK_T)
    choice = tl.arange(0, PAIRS_K)
    pairs = t[:, None] * K + choice[None, :]  # [BLOCK_T, PAIRS_K]
    ok = (t < tokens)[:, None] & (choice < K)[None, :]
    chosen = tl.load(chosen_ptr + pairs, mask=ok, other=-1)
    weights = tl.load(weights_ptr + pairs, mask=ok, other=0.0)
    n = number * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inner = tl.arange(0, BLOCK_K)[None, :]
    off_w = tl.minimum(n, H - 1)[:, None] * INNER + inner  # [BLOCK_N, BLOCK_K]
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        k = (step % STEPS) * BLOCK_K
        expert = tl.load(distinct_ptr + step // STEPS)
        here = chosen == expert
        ok_t = tl.max(here.to(tl.int32), 1) > 0  # [BLOCK_T]
        pair = tl.sum(tl.where(here, pairs, 0), 1)
        weight = tl.sum(tl.where(here, weights, 0.0), 1)
        w = weight_tile(w_ptr + expert.to(tl.int64) * (H * INNER) + off_w, k, INNER, BLOCK_K)
        x = _tokens(states_ptr + pair[:, None] * INNER + inner, ok_t, k, INNER, BLOCK_K)
        product = tl.dot(w, x, input_precision=PRECISION)
        total += tl.where(ok_t[None, :], product * weight[None, :], 0.0)
    if SPLIT == 1:
        _store(total, y_ptr, residual_ptr, shared_ptr, gate_ptr, n, t, tokens, stride_r, stride_s, H)
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_T
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + t[None, :]  # [BLOCK_N, BLOCK_T]
        parts = partial_ptr + number.to(tl.int64) * (SPLIT * SIZE)
        tl.store(parts + part * SIZE + cell, total)
        # Every thread has stored its share of the part before one of them counts it.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + number, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            tl.store(arrived_ptr + number, 0)
            total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for other in tl.static_range(SPLIT):
                # .cg bypasses the L1 cache, which may hold values from before another program wrote.
                total += tl.load(parts + other * SIZE + cell, cache_modifier=".cg")
            _store(total, y_ptr, residual_ptr, shared_ptr, gate_ptr, n, t, tokens, stride_r, stride_s, H)
