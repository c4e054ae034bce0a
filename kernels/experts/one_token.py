"""Products of one token with its K experts: gate and up with the activation, then down with the weighted sum over experts.

As in `layer/matvec.py` the matrix unit is not used: a program takes a few weight rows, a tile of columns at a time. Called
by `few.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import weight_tile


@triton.jit
def _x_tile(x_ptr, k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[BLOCK_K]` elements of x from k on, in fp32."""
    column = k + tl.arange(0, BLOCK_K)
    return tl.load(x_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _products(w, x, VECTOR: tl.constexpr):
    """`w: [BLOCK_N, BLOCK_K]` times `x: [BLOCK_K]`, VECTOR neighbours added up: `[BLOCK_N, BLOCK_K / VECTOR]`."""
    products = w.to(tl.float32) * x[None, :]
    if VECTOR == 1:
        return products
    return tl.sum(tl.reshape(products, (w.shape[0], w.shape[1] // VECTOR, VECTOR)), 2)


@triton.jit
def one_gate_up_kernel(
    x_ptr, w_ptr, chosen_ptr, y_ptr,
    H: tl.constexpr, INNER: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of gate and up of the token's expert number `program_id(1)`."""
    if OVERLAP:
        # In this order: the next launch starts when the router's choice is final, and may read it at once.
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(1)
    expert = tl.load(chosen_ptr + slot).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Instead of a mask: past the last row, the last row is read again.
    off_w = tl.minimum(n, INNER - 1)[:, None] * H + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_N, BLOCK_K]
    gate_ptr = w_ptr + expert * (2 * INNER * H) + off_w
    up_ptr = gate_ptr + INNER * H
    gate, up = weight_tile(gate_ptr, 0, H, BLOCK_K), weight_tile(up_ptr, 0, H, BLOCK_K)
    x = _x_tile(x_ptr, 0, H, BLOCK_K)
    acc, acc_up = _products(gate, x, VECTOR), _products(up, x, VECTOR)  # [BLOCK_N, BLOCK_K / VECTOR]
    for k in tl.range(BLOCK_K, H, BLOCK_K, num_stages=STAGES):
        gate, up = weight_tile(gate_ptr, k, H, BLOCK_K), weight_tile(up_ptr, k, H, BLOCK_K)
        x = _x_tile(x_ptr, k, H, BLOCK_K)
        acc += _products(gate, x, VECTOR)
        acc_up += _products(up, x, VECTOR)
    y = silu_gate(tl.sum(acc, 1), tl.sum(acc_up, 1))
    tl.store(y_ptr + slot * INNER + n, y.to(y_ptr.dtype.element_ty), mask=n < INNER)


@triton.jit
def one_down_kernel(
    states_ptr, w_ptr, chosen_ptr, weights_ptr, residual_ptr, shared_ptr, gate_ptr, y_ptr,
    H: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs: the rows of down of all K experts, one after the other, as one row of `K * INNER` columns."""
    if OVERLAP:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    off_w = tl.minimum(n, H - 1)[:, None] * INNER + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_N, BLOCK_K]
    STEPS: tl.constexpr = (INNER + BLOCK_K - 1) // BLOCK_K
    if OVERLAP and not SETTLED:
        gdc_wait()
    # The launch ahead started this one when the choice was final. .cg bypasses the L1 cache, which may hold older values.
    expert = tl.load(chosen_ptr, cache_modifier=".cg").to(tl.int64)
    w = weight_tile(w_ptr + expert * (H * INNER) + off_w, 0, INNER, BLOCK_K)
    if OVERLAP and SETTLED:
        gdc_wait()
    ok = n < H
    added = tl.zeros([BLOCK_N], tl.float32)
    if residual_ptr is not None:
        added += tl.load(residual_ptr + n, mask=ok, other=0.0).to(tl.float32)
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + n, mask=ok, other=0.0).to(tl.float32)
        added += shared / (1.0 + tl.exp(-tl.load(gate_ptr)))
    x = _x_tile(states_ptr, 0, INNER, BLOCK_K) * tl.load(weights_ptr)
    acc = w.to(tl.float32) * x[None, :]  # [BLOCK_N, BLOCK_K]
    for step in tl.range(1, K * STEPS, num_stages=STAGES):
        slot = step // STEPS
        k = (step % STEPS) * BLOCK_K
        expert = tl.load(chosen_ptr + slot).to(tl.int64)
        w = weight_tile(w_ptr + expert * (H * INNER) + off_w, k, INNER, BLOCK_K)
        x = _x_tile(states_ptr + slot * INNER, k, INNER, BLOCK_K) * tl.load(weights_ptr + slot)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1) + added
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def one_down_at_once_kernel(
    states_ptr, w_ptr, chosen_ptr, weights_ptr, residual_ptr, shared_ptr, gate_ptr, y_ptr,
    H: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLOTS: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs, for short rows: those of all K experts are asked for at once, before the states are there."""
    if OVERLAP:
        gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, SLOTS)
    column = tl.arange(0, BLOCK_K)
    if OVERLAP and not SETTLED:
        gdc_wait()
    ok_k = slot < K
    # The launch ahead started this one when the choice was final. .cg bypasses the L1 cache, which may hold older values.
    expert = tl.load(chosen_ptr + slot, mask=ok_k, other=0, cache_modifier=".cg").to(tl.int64)  # [SLOTS]
    off_w = expert[None, :, None] * (H * INNER) + tl.minimum(n, H - 1)[:, None, None] * INNER + column[None, None, :]
    inside = ok_k[:, None] & (column < INNER)[None, :]  # [SLOTS, BLOCK_K]
    w = tl.load(w_ptr + off_w, mask=inside[None, :, :], other=0.0, eviction_policy="evict_first")
    if OVERLAP and SETTLED:
        gdc_wait()
    weight = tl.load(weights_ptr + slot, mask=ok_k, other=0.0)
    x = tl.load(states_ptr + slot[:, None] * INNER + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x *= weight[:, None]
    y = tl.sum(tl.sum(w.to(tl.float32) * x[None, :, :], 2), 1)  # [BLOCK_N]
    ok = n < H
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + n, mask=ok, other=0.0).to(tl.float32)
        y += shared / (1.0 + tl.exp(-tl.load(gate_ptr)))
    if residual_ptr is not None:
        y += tl.load(residual_ptr + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=ok)
