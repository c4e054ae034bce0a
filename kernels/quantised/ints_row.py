"""Triton: products of one token with 8-bit weights that have a scale for each row (`weights.RowInts`).

As `layer/matvec.py`; integers become numbers in registers, and the scale multiplies the sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.eight_bits import widened
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.tiles import find_tile, pick, weight_tile

# Columns that a thread adds up at once.
CHUNK = tl.constexpr(16)


class IntPointers(NamedTuple):
    """What a kernel reads of a weight."""

    integers_ptr: Any
    scales_ptr: Any


@triton.jit
def _partial(integers, x):
    """The products of `integers: [BLOCK_N, BLOCK_K]` with x, added up by chunks: `[BLOCK_N, BLOCK_K / CHUNK]`."""
    products = widened(integers, tl.float32) * x[None, :]
    return tl.sum(tl.reshape(products, (integers.shape[0], integers.shape[1] // CHUNK, CHUNK)), 2)


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def ints_row_kernel(
    x_ptr, w0, w1, w2, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, n0, n1, n2,
    K: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one weight, or of w0 and w1 if GATED, times `x: [K]`."""
    if OVERLAP:
        gdc_launch_dependents()
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, BLOCK_N, WEIGHTS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Instead of a mask: past the last row, the last row is read again.
    row = tl.minimum(n, rows - 1)
    off_w = row.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_N, BLOCK_K]
    if OVERLAP and not SETTLED:
        gdc_wait()
    integers_ptr = pick(which, w0.integers_ptr, w1.integers_ptr, w2.integers_ptr, WEIGHTS)
    w = weight_tile(integers_ptr + off_w, 0, K, BLOCK_K)
    scale = tl.load(pick(which, w0.scales_ptr, w1.scales_ptr, w2.scales_ptr, WEIGHTS) + row).to(tl.float32)
    if GATED:
        u = weight_tile(w1.integers_ptr + off_w, 0, K, BLOCK_K)
        scale_u = tl.load(w1.scales_ptr + row).to(tl.float32)
    if OVERLAP and SETTLED:
        gdc_wait()
    ok = n < rows
    added = tl.zeros([BLOCK_N], tl.float32)
    if b0_ptr is not None:
        added += tl.load(pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS) + n, mask=ok, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        added += tl.load(residual_ptr + n, mask=ok, other=0.0).to(tl.float32)
    k_n = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + k_n, mask=k_n < K, other=0.0).to(tl.float32)  # [BLOCK_K]
    acc = _partial(w, x)
    if GATED:
        acc_u = _partial(u, x)
    for k in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        w = weight_tile(integers_ptr + off_w, k, K, BLOCK_K)
        x = tl.load(x_ptr + k + k_n, mask=k + k_n < K, other=0.0).to(tl.float32)
        acc += _partial(w, x)
        if GATED:
            acc_u += _partial(weight_tile(w1.integers_ptr + off_w, k, K, BLOCK_K), x)
    y = tl.sum(acc, 1) * scale  # [BLOCK_N]
    if GATED:
        y = silu_gate(y, tl.sum(acc_u, 1) * scale_u)
    tl.store(y_ptr + column + n, (y + added).to(y_ptr.dtype.element_ty), mask=ok)
