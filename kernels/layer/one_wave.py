"""[RMSNorm, then] products of one token with weights so small that all programs run at once, in one launch.

`y_i = n W_i^T + b_i` for up to three weights `[N_i, K]`, or `silu(n Wg^T) * (n Wu^T)`, where n is x or its RMSNorm. What a
launch of a small model costs is mostly waiting: for the launch ahead, for x, for memory. So a program asks for all weights
that it multiplies before it waits for the launch ahead, and holds them in registers; and since every program reads all of x
anyway, it normalises x itself, in place of a launch between two products. The norm is rounded to the dtype of x, as
`norm.py` does; sums are fp32, rounded once, after bias and residual are added. Larger weights take `matvec.py`. The plain
PyTorch versions are in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.configs import RowTile
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.quick_launch import launch

MOST_WEIGHTS = 3
# Columns that the lanes of a warp load at once, 8 elements each. A warp takes whole rows, so that no warp waits for another.
LANES = 256
# Columns of a tile, and the most tiles of a row: a program holds the weights of all of them at once.
BLOCK = 1024
MOST_BLOCKS = 4
# Per cent of a multiprocessor's memory that are shared memory, where L1 cache is asked for. A step of Qwen3-0.6B with 2,048
# keys took 0.74 ms in place of 0.82 on an H200, in a trial in which norms asked too; with none of it, 0.76.
CARVE_OUT = 50


@triton.jit
def _none():
    """What tuples of tiles begin as."""
    return ()


@triton.jit
def _tile(pointers, columns, K: tl.constexpr, BLOCK: tl.constexpr):
    """Elements at `pointers`, which lie at `columns` of K."""
    if K % BLOCK == 0:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=columns < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _lane_sums(w, x):
    """Products of `[WARPS, BLOCK / LANES, LANES]` added up over the second dimension."""
    return tl.sum(w.to(tl.float32) * x.to(tl.float32), 1)


@triton.jit
def _factor(weight, UNIT_OFFSET: tl.constexpr):
    wide = weight.to(tl.float32)
    return wide + 1.0 if UNIT_OFFSET else wide


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def one_wave_kernel(
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, n0, n1, n2, eps,
    K: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, BLOCKS: tl.constexpr,
    SETTLED: tl.constexpr, OVERLAP: tl.constexpr, L1: tl.constexpr,
):  # fmt: skip
    """WARPS * ROWS rows of one weight, or of w0 and w1 if GATED, times `x: [K]` or, with `norm_ptr`, its RMSNorm.

    With L1 the kernel is another one for CUDA's driver, whose launches ask for L1 cache.
    """
    if OVERLAP:
        gdc_launch_dependents()
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, WARPS * ROWS, WEIGHTS)
    w_ptr = pick(which, w0_ptr, w1_ptr, w2_ptr, WEIGHTS)
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    n = tile * (WARPS * ROWS) + tl.arange(0, WARPS)  # [WARPS]: the first row of each warp
    column_k = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [BLOCK / LANES, LANES]
    # The first dimension is that of warps, as Triton lays such tiles out.
    columns = column_k[None, :, :] + tl.zeros([WARPS, 1, 1], tl.int32)  # [WARPS, BLOCK / LANES, LANES]
    dtype = x_ptr.dtype.element_ty
    if OVERLAP and not SETTLED:
        gdc_wait()
    w = _none()
    u = _none()
    added = _none()
    for row in tl.static_range(ROWS):
        # Instead of a mask: past the last row, the last row is read again.
        off_w = tl.minimum(n + row * WARPS, rows - 1).to(tl.int64)[:, None, None] * K + columns
        for block in tl.static_range(BLOCKS):
            w += (_tile(w_ptr + off_w + block * BLOCK, columns + block * BLOCK, K, BLOCK),)
            if GATED:
                u += (_tile(w1_ptr + off_w + block * BLOCK, columns + block * BLOCK, K, BLOCK),)
        bias = tl.zeros([WARPS], tl.float32)
        if b_ptr is not None:
            bias = tl.load(b_ptr + n + row * WARPS, mask=n + row * WARPS < rows, other=0.0).to(tl.float32)
        added += (bias,)
    factors = _none()
    if norm_ptr is not None:
        for block in tl.static_range(BLOCKS):
            at = column_k + block * BLOCK
            factors += (tl.load(norm_ptr + at, mask=at < K, other=0.0),)
    if OVERLAP and SETTLED:
        gdc_wait()
    x = _none()
    if norm_ptr is None:
        # Once for each warp, which needs all of it.
        for block in tl.static_range(BLOCKS):
            at = columns + block * BLOCK
            x += (tl.load(x_ptr + at, mask=at < K, other=0.0),)
    else:
        # Once for the program, which normalises it.
        raw = _none()
        for block in tl.static_range(BLOCKS):
            at = column_k + block * BLOCK
            raw += (tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32),)
        squares = raw[0] * raw[0]
        for block in tl.static_range(1, BLOCKS):
            squares += raw[block] * raw[block]
        inverse = tl.rsqrt(tl.sum(squares) / K + eps)
        for block in tl.static_range(BLOCKS):
            x += ((raw[block] * inverse * _factor(factors[block], UNIT_OFFSET)).to(dtype)[None, :, :],)
    stream = _none()
    for row in tl.static_range(ROWS):
        if residual_ptr is not None:
            stream += (tl.load(residual_ptr + n + row * WARPS, mask=n + row * WARPS < rows, other=0.0).to(tl.float32),)
    for row in tl.static_range(ROWS):
        acc = tl.zeros([WARPS, LANES], tl.float32)
        acc_u = acc
        for block in tl.static_range(BLOCKS):
            acc += _lane_sums(w[row * BLOCKS + block], x[block])
            if GATED:
                acc_u += _lane_sums(u[row * BLOCKS + block], x[block])
        y = tl.sum(acc, 1)  # [WARPS]
        if GATED:
            y = silu_gate(y, tl.sum(acc_u, 1))
        y += added[row]
        if residual_ptr is not None:
            y += stream[row]
        at = n + row * WARPS
        tl.store(y_ptr + column + at, y.to(y_ptr.dtype.element_ty), mask=at < rows)


def one_wave(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    tile: RowTile,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
    gated: bool = False,
    weights_settled: bool = False,
    asks_for_l1: bool = False,
) -> Tensor:
    """`n W^T + b` for up to three weights in one launch, where n is x or its RMSNorm; or `silu(n Wg^T) * (n Wu^T)`.

    Args:
        x: `[1, K]` bf16 or fp16, contiguous.
        weights: each `[N_i, K]`, contiguous, of the dtype of x; gate and up if `gated`.
        biases: `[N_i]` for each weight, or none at all.
        tile: launch configuration, of `configs.one_wave_tile`.
        residual: `[1, N]` of the dtype of x, added to the product of a single weight.
        norm: `[K]` weight of the RMSNorm of x; none by default.
        eps: added to its mean square.
        unit_offset: it multiplies by `1 + norm`.
        gated: the activation of gate times up.
        weights_settled: no launch that may still be running writes a weight, so all weights are read before the launch ahead
            has ended. Launches overlap, so the one before the last counts too.
        asks_for_l1: half of the multiprocessors' memory is to be L1 cache, as it is by itself unless launches around this
            one take shared memory.

    Returns:
        `[1, N_0 + N_1 + N_2]`, or `[1, N]` if gated, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    _check(x, weights, biases, residual, norm, gated)
    counts = [weight.shape[0] for weight in weights]
    y = torch.empty((1, counts[0] if gated else sum(counts)), dtype=x.dtype, device=x.device)
    used = 1 if gated else len(weights)
    spare: list[Tensor | None] = [None] * (MOST_WEIGHTS - len(weights))
    added = [*biases, *spare] if biases else [None] * MOST_WEIGHTS
    overlap = overlaps_launches(arch_of(x.device))
    programs = sum(-(-count // (tile.rows * tile.warps)) for count in counts[:used])
    k = x.shape[1]
    with on_device_of(x):
        launch(
            one_wave_kernel, (programs,),
            (x, norm, *weights, *spare, *added, y, residual, *(counts + [0, 0])[:MOST_WEIGHTS], eps),
            dict(
                K=k, WEIGHTS=used, GATED=gated, UNIT_OFFSET=unit_offset, WARPS=tile.warps, ROWS=tile.rows,
                BLOCK=BLOCK, LANES=LANES, BLOCKS=-(-k // BLOCK), SETTLED=weights_settled, OVERLAP=overlap,
                L1=asks_for_l1, num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
            ),
            carve_out=CARVE_OUT if asks_for_l1 else None,
        )  # fmt: skip
    return y


def _check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, residual: Tensor | None, norm: Tensor | None,
    gated: bool,
) -> None:  # fmt: skip
    if x.ndim != 2 or x.shape[0] != 1 or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
        raise ValueError(f"x {tuple(x.shape)}, {x.dtype}, must be [1, K], contiguous, bf16 or fp16")
    k = x.shape[1]
    if k > BLOCK * MOST_BLOCKS:
        raise ValueError(f"x of K={k} columns is longer than {BLOCK * MOST_BLOCKS}; take matvec")
    if not 1 <= len(weights) <= MOST_WEIGHTS or (biases is not None and len(biases) != len(weights)):
        raise ValueError(f"{len(weights)} weights and {len(biases or ())} biases; expected 1 to 3, a bias for each or none")
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != k or weight.dtype is not x.dtype or not weight.is_contiguous():
            raise ValueError(f"weight {tuple(weight.shape)}, {weight.dtype}, must be [N, {k}], {x.dtype}, contiguous")
    if gated and (len(weights) != 2 or weights[0].shape != weights[1].shape or biases or residual is not None):
        raise ValueError("gated takes two weights of one shape, no biases and no residual")
    for weight, bias in zip(weights, biases or (), strict=False):
        if bias.shape != weight.shape[:1] or not bias.is_contiguous():
            raise ValueError(f"bias {tuple(bias.shape)} must be [N] = {[weight.shape[0]]} and contiguous")
    if norm is not None and (norm.shape != (k,) or not norm.is_contiguous()):
        raise ValueError(f"norm {tuple(norm.shape)} must be [K] = {[k]} and contiguous")
    if residual is not None and (
        len(weights) != 1 or residual.shape != (1, weights[0].shape[0]) or residual.dtype is not x.dtype
    ):
        raise ValueError(f"residual {tuple(residual.shape)}, {residual.dtype}, must be as the output of a single weight")
