"""[RMSNorm, then] products of 2 to 16 tokens on the matrix unit, of weights that never pass through shared memory.

`y_i = n W_i^T + b_i` for up to three weights `[N_i, K]`, or `silu(n Wg^T) * (n Wu^T)`, where n is x or its RMSNorm. A
program takes 16 rows of a weight, or of gate and of up; its warps share the columns. Each lane asks for its weights of the
first columns before it waits for the launch ahead, and holds them in the registers from which the matrix unit takes them
(`token_fragments.py`): nothing is copied, no program waits for another, and none adds up another's sums. Since every program
reads all of x anyway, it normalises x on the way, in place of a launch between two products: x times the norm's weight is
rounded to the dtype of x, squares are added up in passing, and the sums are scaled at the end. Sums are fp32, rounded once,
after bias and residual are added. More tokens, fp32 and adapters go to `skinny.py`. The plain PyTorch versions are in
`reference.py`.
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
from hf_fastattn.kernels.layer.few_rows_configs import FewRowsTile
from hf_fastattn.kernels.layer.lanes import no_sums, store_sums
from hf_fastattn.kernels.layer.tiles import find_tile, pick
from hf_fastattn.kernels.layer.token_fragments import (
    COLUMNS,
    multiply,
    no_fragments,
    normalise,
    scale_of_tokens,
    sums_of_rows,
    weight_fragments,
    x_fragment,
)
from hf_fastattn.kernels.quick_launch import is_known_version, launch

MOST_WEIGHTS = 3
# Tokens of which a lane holds sums, and rows of a weight.
MOST_TOKENS, ROWS = 16, tl.constexpr(16)
DTYPES = (torch.bfloat16, torch.float16)
# Per cent of a multiprocessor's memory that are shared memory, for up to eight tokens and for more: x stays in the rest.
CARVE_OUT, CARVE_OUT_OF_MANY = 0, 50


@triton.jit(do_not_specialize=["tokens", "n0", "n1", "n2"])
def few_rows_kernel(
    x_ptr, norm_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, tokens, n0, n1, n2,
    stride_x, stride_y, stride_r, eps,
    K: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr, UNIT_OFFSET: tl.constexpr, SUMS: tl.constexpr,
    WARPS: tl.constexpr, LOADS: tl.constexpr, HELD: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
    L1: tl.constexpr,
):  # fmt: skip
    """16 rows of one weight, or of w0 and w1 if GATED, times `x: [tokens, K]` or, with `norm_ptr`, its RMSNorm.

    With L1 the kernel is another one for CUDA's driver, whose launches ask for L1 cache.
    """
    if OVERLAP:
        gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # Each warp takes a part of this many columns a round.
    PARTS: tl.constexpr = K // (COLUMNS.value * LOADS)
    ROUNDS: tl.constexpr = (PARTS + WARPS - 1) // WARPS
    which, rows, column, tile = find_tile(tl.program_id(0), n0, n1, n2, ROWS.value, WEIGHTS)
    thread = tl.arange(0, 32 * WARPS)
    group, lane, warp = thread % 32 // 4, thread % 4, thread // 32
    # Instead of masks: past the last row or token, the last one is read again. Offsets in words of 8 bytes fit 32 bits.
    low = tl.minimum(tile * ROWS.value + group, rows - 1) * (K // 4) + 2 * lane
    high = tl.minimum(tile * ROWS.value + group + 8, rows - 1) * (K // 4) + 2 * lane
    w_ptr = pick(which, w0_ptr, w1_ptr, w2_ptr, WEIGHTS).to(tl.pointer_type(tl.int64))
    u_ptr = w_ptr
    if GATED:
        u_ptr = w1_ptr.to(tl.pointer_type(tl.int64))
    if OVERLAP and not SETTLED:
        gdc_wait()
    w = no_fragments()
    u = no_fragments()
    for held in tl.static_range(HELD):
        part = held * WARPS + warp
        w += (weight_fragments(w_ptr + low, w_ptr + high, part, LOADS, PARTS, (held + 1) * WARPS <= PARTS),)
        if GATED:
            u += (weight_fragments(u_ptr + low, u_ptr + high, part, LOADS, PARTS, (held + 1) * WARPS <= PARTS),)
    if OVERLAP and SETTLED:
        gdc_wait()
    x8_ptr = x_ptr.to(tl.pointer_type(tl.int64)) + 2 * lane
    first_ptr = x8_ptr + tl.minimum(group, tokens - 1) * (stride_x // 4)
    second_ptr = x8_ptr + tl.minimum(group + 8, tokens - 1) * (stride_x // 4)
    n8_ptr = None
    if norm_ptr is not None:
        n8_ptr = norm_ptr.to(tl.pointer_type(tl.int64)) + 2 * lane
    acc = no_sums(32 * WARPS, 8)
    acc_u = acc
    squares = tl.zeros([32 * WARPS], tl.float32)
    squares_second = squares
    for round in tl.static_range(ROUNDS):
        part = round * WARPS + warp
        for load in tl.static_range(LOADS):
            first = x_fragment(first_ptr, part, load, LOADS, PARTS, (round + 1) * WARPS <= PARTS)
            second = first
            if SUMS == 8:
                second = x_fragment(second_ptr, part, load, LOADS, PARTS, (round + 1) * WARPS <= PARTS)
            if norm_ptr is not None:
                factor = x_fragment(n8_ptr, part, load, LOADS, PARTS, (round + 1) * WARPS <= PARTS)
                first, squares = normalise(first, factor, squares, UNIT_OFFSET)
                if SUMS == 8:
                    second, squares_second = normalise(second, factor, squares_second, UNIT_OFFSET)
            acc = multiply(acc, w[round][load], first, second, dtype, SUMS)
            if GATED:
                acc_u = multiply(acc_u, u[round][load], first, second, dtype, SUMS)
        if round + HELD < ROUNDS:
            part = (round + HELD) * WARPS + warp
            w += (weight_fragments(w_ptr + low, w_ptr + high, part, LOADS, PARTS, (round + HELD + 1) * WARPS <= PARTS),)
            if GATED:
                u += (weight_fragments(u_ptr + low, u_ptr + high, part, LOADS, PARTS, (round + HELD + 1) * WARPS <= PARTS),)
    y = sums_of_rows(acc, SUMS)  # [32, SUMS]
    y_u = y
    if GATED:
        y_u = sums_of_rows(acc_u, SUMS)
    if norm_ptr is not None:
        scale = scale_of_tokens(squares, squares_second, K, eps, SUMS)
        y = y * scale
        y_u = y_u * scale
    if GATED:
        y = silu_gate(y, y_u)
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    store_sums(y, y_ptr, residual_ptr, b_ptr, tile * ROWS.value, rows, tokens, column, stride_y, stride_r)


def few_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    tile: FewRowsTile,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
    gated: bool = False,
    weights_settled: bool = False,
    asks_for_l1: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`n W^T + b` for up to three weights in one launch, where n is x or its RMSNorm; or `silu(n Wg^T) * (n Wu^T)`.

    Args:
        x: `[T, K]` bf16 or fp16, T up to 16; rows are contiguous and begin at whole 16 bytes; K a multiple of
            `32 * tile.loads`.
        weights: each `[N_i, K]`, contiguous, of the dtype of x; gate and up if `gated`.
        biases: `[N_i]` for each weight, or none at all.
        tile: launch configuration, of `few_rows_configs.few_rows_tile`.
        residual: `[T, N]` of the dtype of x or fp32, added to the product of a single weight.
        norm: `[K]` weight of the RMSNorm of x, both in bf16: in fp16, x times the weight could overflow; none by default.
        eps: added to its mean square.
        unit_offset: it multiplies by `1 + norm`.
        gated: the activation of gate times up.
        weights_settled: no launch that may still be running writes a weight, so the first weights are read before the launch
            ahead has ended. Launches overlap, so the one before the last counts too.
        asks_for_l1: the multiprocessors' memory is to be L1 cache for the most part, as it is by itself unless launches
            around this one take shared memory. Going over from one to the other takes a microsecond or two.
        out: where the products go, contiguous, of the shape and dtype returned; a new tensor by default.

    Returns:
        `[T, N_0 + N_1 + N_2]`, or `[T, N]` if gated, in the dtype of the residual, or else of x.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    _check(x, weights, biases, tile, residual, norm, gated)
    dtype = x.dtype if residual is None else residual.dtype
    shape = (x.shape[0], weights[0].shape[0] if gated else sum(weight.shape[0] for weight in weights))
    if out is not None and (out.shape != shape or out.dtype is not dtype or not out.is_contiguous()):
        raise ValueError(f"out {tuple(out.shape)}, {out.dtype}, must be {list(shape)}, {dtype}, contiguous")
    y = torch.empty(shape, dtype=dtype, device=x.device) if out is None else out
    fill_few_rows(x, weights, biases, residual, y, norm, eps, unit_offset, gated, weights_settled, asks_for_l1, tile)
    return y


def fill_few_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    residual: Tensor | None,
    y: Tensor,
    norm: Tensor | None,
    eps: float,
    unit_offset: bool,
    gated: bool,
    weights_settled: bool,
    asks_for_l1: bool,
    tile: FewRowsTile,
) -> None:
    """Fill `y: [T, N]` with the products of `few_rows`, whose arguments it or `matvec` and `takes` have checked."""
    tokens, k = x.shape
    counts = [weight.shape[0] for weight in weights]
    used = 1 if gated else len(weights)
    spare: list[Tensor | None] = [None] * (MOST_WEIGHTS - len(weights))
    added = [*biases, *spare] if biases else [None] * MOST_WEIGHTS
    overlap = overlaps_launches(arch_of(x.device))
    many = tokens > MOST_TOKENS // 2
    rounds = -(-k // (COLUMNS.value * tile.loads * tile.warps))
    with on_device_of(x):
        launch(
            few_rows_kernel, (sum(-(-count // ROWS.value) for count in counts[:used]),),
            (
                x, norm, *weights, *spare, *added, y, residual, tokens, *(counts + [0, 0])[:MOST_WEIGHTS],
                x.stride(0), y.stride(0), 0 if residual is None else residual.stride(0), eps,
            ),
            dict(
                K=k, WEIGHTS=used, GATED=gated, UNIT_OFFSET=unit_offset, SUMS=8 if many else 4,
                WARPS=tile.warps, LOADS=tile.loads, HELD=min(tile.held, rounds), SETTLED=weights_settled, OVERLAP=overlap,
                L1=asks_for_l1, num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
            ),
            carve_out=(CARVE_OUT_OF_MANY if many else CARVE_OUT) if asks_for_l1 else None,
        )  # fmt: skip


def takes(x: Tensor, weights: Sequence[Tensor], tile: FewRowsTile, asks_for_l1: bool = False) -> bool:
    """Whether the kernel can read `x: [T, K]` and weights `[N_i, K]` with this tile, and gets the L1 cache it asks for."""
    return (
        x.dtype in DTYPES
        and (is_known_version() or not asks_for_l1)
        and x.shape[0] <= MOST_TOKENS
        and x.shape[1] % (COLUMNS.value * tile.loads) == 0
        and _is_aligned(x)
        and all(weight.dtype is x.dtype and weight.is_contiguous() and _is_aligned(weight) for weight in weights)
    )


def takes_norm(x: Tensor, norm: Tensor) -> bool:
    """Whether the kernel can normalise x with this weight."""
    of_type = norm.dtype is torch.bfloat16 and x.dtype is torch.bfloat16
    return of_type and norm.shape == x.shape[1:] and norm.is_contiguous() and norm.data_ptr() % 16 == 0


def _is_aligned(x: Tensor) -> bool:
    """Whether every row begins at whole 16 bytes, and is contiguous."""
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _check(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, tile: FewRowsTile, residual: Tensor | None,
    norm: Tensor | None, gated: bool,
) -> None:  # fmt: skip
    fits = x.ndim == 2 and x.shape[0] and 1 <= len(weights) <= MOST_WEIGHTS and all(weight.ndim == 2 for weight in weights)
    if not fits or not takes(x, weights, tile):
        raise ValueError(
            f"x {tuple(x.shape)}, {x.dtype}, strides {x.stride()}, and weights "
            f"{[(tuple(weight.shape), weight.dtype) for weight in weights]} must be [T, K] with T up to {MOST_TOKENS} and "
            "one to three [N, K], bf16 or fp16, rows of whole 16 bytes, K a multiple of "
            f"{COLUMNS.value * tile.loads}; take matvec"
        )
    k = x.shape[1]
    for weight in weights:
        if weight.shape[1] != k:
            raise ValueError(f"weight {tuple(weight.shape)} must be [N, {k}]")
    if biases is not None and len(biases) != len(weights):
        raise ValueError(f"{len(biases)} biases for {len(weights)} weights; expected a bias for each or none")
    if gated and (len(weights) != 2 or weights[0].shape != weights[1].shape or biases or residual is not None):
        raise ValueError("gated takes two weights of one shape, no biases and no residual")
    for weight, bias in zip(weights, biases or (), strict=False):
        if bias.shape != weight.shape[:1] or not bias.is_contiguous():
            raise ValueError(f"bias {tuple(bias.shape)} must be [N] = {[weight.shape[0]]} and contiguous")
    if norm is not None and not takes_norm(x, norm):
        raise ValueError(
            f"norm {tuple(norm.shape)}, {norm.dtype}, of x in {x.dtype}, must be [K] = {[k]}, contiguous, at whole 16 "
            "bytes, both in bf16"
        )
    if residual is not None and (
        len(weights) != 1
        or residual.shape != (x.shape[0], weights[0].shape[0])
        or residual.dtype not in (x.dtype, torch.float32)
        or residual.stride(1) != 1
    ):
        raise ValueError(
            f"residual {tuple(residual.shape)}, {residual.dtype}, must be as the output of a single weight, {x.dtype} or "
            "fp32, rows contiguous"
        )
