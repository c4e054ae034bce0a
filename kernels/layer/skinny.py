"""Products of 2 to 64 tokens with several weights in one launch, on the matrix unit.

The weights are the large operand, `[BLOCK_N, BLOCK_K]` a step of the pipeline; the tokens are the small one, padded to 16
or more. Where there are too few tiles of weight rows to keep the memory busy, programs share a tile (split-K): each sums
its part of K, and the last one to arrive adds the parts in fixed order, so results are bitwise repeatable. Called by
`matvec.py`; the plain PyTorch versions are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import arch_of, matrix_precision, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.configs import ProductTile
from hf_fastattn.kernels.layer.lora_programs import (
    b_of_tokens,
    expand_held,
    expand_tokens,
    shrink_tokens,
    sums_of_tokens,
)
from hf_fastattn.kernels.layer.split_sums import MOST_TILES, SplitSums, leave_part, sum_parts
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.rehearsal import prepared


@triton.jit
def _weights(pointers, k, end, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile `[BLOCK_N, BLOCK_K]` from column k on. Every weight is read once a launch, so it need not stay in the cache."""
    if EVEN:
        return tl.load(pointers + k, eviction_policy="evict_first")
    column = k + tl.arange(0, BLOCK_K)
    return tl.load(pointers + k, mask=(column < end)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _tokens(pointers, ok, k, end, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """x from column k on, transposed: `[BLOCK_K, BLOCK_T]`."""
    if EVEN:
        return tl.trans(tl.load(pointers + k, mask=ok[:, None], other=0.0))
    column = k + tl.arange(0, BLOCK_K)
    return tl.trans(tl.load(pointers + k, mask=ok[:, None] & (column < end)[None, :], other=0.0))


@triton.jit
def _add_product(acc, lost, w, x, PRECISION: tl.constexpr):
    """`acc + w x`, w rounded to the dtype of x, sums `[BLOCK_N, BLOCK_T]`; `lost` is the rounding error of the sums so far.

    In fp32 one chain of additions as long as K would err more than PyTorch's sum. So only the products of a tile are one
    chain, and tiles are added with compensation (Kahan, 1965): the compiler would turn a plain sum of tiles back into one
    chain.
    """
    w = w.to(x.dtype)
    if PRECISION != "tf32":
        part = tl.dot(w, x, input_precision=PRECISION) - lost
        total = acc + part
        return total, (total - acc) - part
    return tl.dot(w, x, acc), lost


@triton.jit
def _store(
    acc, acc_u, y_ptr, residual_ptr, b_ptr, n, t, rows, tokens, column, stride_y, stride_r, GATED: tl.constexpr
):  # fmt: skip
    """`[BLOCK_N, BLOCK_T]` sums to the rows of y."""
    ok = (n < rows)[:, None] & (t < tokens)[None, :]
    if GATED:
        acc = silu_gate(acc, acc_u)
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + t[None, :] * stride_r + n[:, None], mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + t[None, :] * stride_y + (column + n)[:, None], acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def skinny_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, partial_ptr, arrived_ptr,
    tokens, n0, n1, n2, stride_x, stride_y, stride_r,
    K: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr,
    PRECISION: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
    lora=None, RANKS: tl.constexpr = None, SAME: tl.constexpr = False, RANK: tl.constexpr = 0, PARTS: tl.constexpr = 0,
    SHRINK_PART: tl.constexpr = 0, SHRINK_K: tl.constexpr = 0, SHRINK_ROWS: tl.constexpr = 0,
    SHRINKERS: tl.constexpr = 0, COLUMNS: tl.constexpr = 0, SHRINK_PRECISION: tl.constexpr = None,
    EXPAND_PRECISION: tl.constexpr = None, EARLY: tl.constexpr = False, members=None,
):  # fmt: skip
    """BLOCK_N rows of one weight, or of w0 and w1 if GATED, times `x: [tokens, K]`, in PART of its columns.

    With adapters the grid has one dimension: the shrinking programs, all tiles of the first part, of the second, ...
    """
    if OVERLAP:
        gdc_launch_dependents()
    ADAPTERS: tl.constexpr = 2 if GATED else WEIGHTS
    number = tl.program_id(0)
    part = tl.program_id(1)
    if lora is not None:
        if number < SHRINKERS:
            shrink_tokens(
                number, x_ptr, tokens, stride_x, lora, members, K, ADAPTERS, RANKS, SAME, RANK, SHRINK_ROWS, PARTS,
                SHRINK_PART, SHRINK_K, BLOCK_T, SHRINK_PRECISION, SETTLED, OVERLAP,
            )  # fmt: skip
            return
        tiles = (tl.num_programs(0) - SHRINKERS) // SPLIT
        part = (number - SHRINKERS) // tiles
        number = (number - SHRINKERS) % tiles
    which, rows, column, tile = find_tile(number, n0, n1, n2, BLOCK_N, WEIGHTS)
    w_ptr = pick(which, w0_ptr, w1_ptr, w2_ptr, WEIGHTS)
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    EVEN: tl.constexpr = K % BLOCK_K == 0
    begin = part * PART
    end = tl.minimum(begin + PART, K)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    t = tl.arange(0, BLOCK_T)
    ok_t = t < tokens
    # Instead of a mask: past the last row, the last row is read again.
    inner = tl.arange(0, BLOCK_K)[None, :]
    off_w = tl.minimum(n, rows - 1).to(tl.int64)[:, None] * K + inner  # [BLOCK_N, BLOCK_K]
    x_tile_ptr = x_ptr + t[:, None] * stride_x + inner  # [BLOCK_T, BLOCK_K]
    if OVERLAP and not SETTLED:
        gdc_wait()
    w_first = _weights(w_ptr + off_w, begin, end, EVEN, BLOCK_K)
    if GATED:
        u_first = _weights(w1_ptr + off_w, begin, end, EVEN, BLOCK_K)
    if EARLY:
        # The first part adds what the adapter does; all others load nothing.
        first_rows = tl.where(part == 0, rows, 0)
        b = b_of_tokens(which, n, first_rows, 0, lora, ADAPTERS, RANKS, SAME, RANK)
        if GATED:
            b_u = b_of_tokens(1, n, first_rows, 0, lora, ADAPTERS, RANKS, SAME, RANK)
    if OVERLAP and SETTLED:
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    acc_u = acc
    lost = acc
    lost_u = acc
    for k in tl.range(begin + BLOCK_K, end, BLOCK_K, num_stages=STAGES):
        w = _weights(w_ptr + off_w, k, end, EVEN, BLOCK_K)
        x = _tokens(x_tile_ptr, ok_t, k, end, EVEN, BLOCK_K)  # [BLOCK_K, BLOCK_T]
        acc, lost = _add_product(acc, lost, w, x, PRECISION)
        if GATED:
            u = _weights(w1_ptr + off_w, k, end, EVEN, BLOCK_K)
            acc_u, lost_u = _add_product(acc_u, lost_u, u, x, PRECISION)
    # The tile loaded first is multiplied last: with this product before the loop, the loop's pipeline would start late.
    x = _tokens(x_tile_ptr, ok_t, begin, end, EVEN, BLOCK_K)
    if EARLY:
        # They come with x. Mostly all are there.
        first_tokens = tl.where(part == 0, tokens, 0)
        h, lacks = sums_of_tokens(which, 0, first_tokens, lora, RANK, PARTS, RANK, BLOCK_T)
        if GATED:
            h_u, lacks_u = sums_of_tokens(1, 0, first_tokens, lora, RANK, PARTS, RANK, BLOCK_T)
    acc, lost = _add_product(acc, lost, w_first, x, PRECISION)
    if GATED:
        acc_u, lost_u = _add_product(acc_u, lost_u, u_first, x, PRECISION)
    if lora is not None:
        # For all other parts, and for the sum of the parts, nothing changes.
        if part == 0:
            if EARLY:
                acc = expand_held(
                    acc, which, b, h, lacks, tokens, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, BLOCK_T, EXPAND_PRECISION
                )  # fmt: skip
                if GATED:
                    acc_u = expand_held(
                        acc_u, 1, b_u, h_u, lacks_u, tokens, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, BLOCK_T,
                        EXPAND_PRECISION,
                    )  # fmt: skip
            else:
                acc = expand_tokens(
                    acc, which, n, rows, tokens, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, COLUMNS, BLOCK_T,
                    EXPAND_PRECISION,
                )  # fmt: skip
                if GATED:
                    acc_u = expand_tokens(
                        acc_u, 1, n, rows, tokens, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, COLUMNS, BLOCK_T,
                        EXPAND_PRECISION,
                    )  # fmt: skip
    if SPLIT == 1:
        _store(acc, acc_u, y_ptr, residual_ptr, b_ptr, n, t, rows, tokens, column, stride_y, stride_r, GATED)
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_T
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + t[None, :]  # [BLOCK_N, BLOCK_T]
        if leave_part(acc, acc_u, cell, number, part, partial_ptr, arrived_ptr, SIZE, SPLIT, GATED):
            total, total_u = sum_parts(cell, number, partial_ptr, arrived_ptr, SIZE, SPLIT, GATED)
            _store(total, total_u, y_ptr, residual_ptr, b_ptr, n, t, rows, tokens, column, stride_y, stride_r, GATED)


def skinny_product(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    residual: Tensor | None,
    y: Tensor,
    gated: bool,
    sums: SplitSums | None,
    weights_settled: bool,
    tile: ProductTile,
    shrinkers: int,
    adapted: dict[str, Any],
) -> None:
    """Fill y with the products side by side; arguments are as `matvec` has checked them.

    Args:
        x: `[T, K]`.
        weights: up to three of `[N_i, K]`, or gate and up; fp32 ones are rounded to the dtype of x.
        biases: `[N_i]` each, or None.
        residual: `[T, N]` to add, or None.
        y: `[T, sum of N_i]`, or `[T, N_0]` if gated.
        gated: y is `silu` of the first product times the second.
        sums: room for partial sums if the tile splits K; made if None.
        weights_settled: see `matvec`.
        tile: launch configuration.
        shrinkers: programs that `adapted`, the keywords of `lora.operands`, asks for; 0 without adapters.
    """
    tokens, k = x.shape
    counts = [weight.shape[0] for weight in weights]
    counts += [0] * (3 - len(counts))
    used = 1 if gated else len(weights)
    spare: list[Tensor | None] = [None] * (3 - len(weights))
    added = [*biases, *spare] if biases else [None] * 3
    # Not `triton.cdiv`, which costs the host a microsecond a call.
    tiles = sum(-(-count // tile.block_n) for count in counts[:used])
    steps = -(-k // tile.block_k)
    # Steps a part, and then parts: rounded so that no part is empty.
    part = -(-steps // min(tile.split, steps)) if tiles <= MOST_TILES else steps
    split = -(-steps // part)
    block_t = max(power_of_2(tokens), 16)
    partial = arrived = None
    if split > 1:
        room = sums or SplitSums(x.device)
        partial = room.partial(tiles * split * tile.block_n * block_t * (2 if gated else 1))
        arrived = room.arrived
    overlap = overlaps_launches(arch_of(x.device))
    with on_device_of(x):
        prepared(skinny_kernel)[(shrinkers + tiles * split,) if shrinkers else (tiles, split)](
            x, *weights, *spare, *added, y, residual, partial, arrived,
            tokens, *counts, x.stride(0), y.stride(0), 0 if residual is None else residual.stride(0),
            K=k, WEIGHTS=used, GATED=gated, BLOCK_T=block_t, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            STAGES=tile.stages, SPLIT=split, PART=part * tile.block_k, PRECISION=matrix_precision(x.dtype, tile.block_n),
            SETTLED=weights_settled, OVERLAP=overlap,
            num_warps=tile.warps, **adapted, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
