"""Products of few tokens with several weights in one launch, at the speed at which the weights can be read.

`y_i = x W_i^T + b_i` for up to three weights `[N_i, K]` (q, k and v of one input), or `silu(x Wg^T) * (x Wu^T)`. The
weights are not copied together: a program finds its weight from its program id. One token is multiplied here, without the
matrix unit: a program takes a few weight rows, a tile of K at a time. More tokens go to `few_rows.py` in 16 bits without
adapters where that is quicker, else to `skinny.py`. Everything is summed in fp32 and rounded once, after bias, residual and
LoRA (see `lora.py`) are added. Under autocast weights may be fp32, and are rounded to the dtype of x as they are read; the
residual is fp32 then, and so is the result.

RMSNorm of x is a launch of its own (`norm.py`): fused here, every program would read the norm's weight beside x, which
costs more than a launch where the L1 cache is small, as after attention kernels with much shared memory. One token of small
models takes `one_wave.py` with the norm, and more of them `few_rows.py`. The plain PyTorch versions are in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer import few_rows
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.layer.configs import MOST_TOKENS, ProductTile, product_tile, room_beside
from hf_fastattn.kernels.layer.few_rows_configs import few_rows_tile
from hf_fastattn.kernels.layer.lora import Adapter, LoraSums, LoraTile, check_adapters, operands
from hf_fastattn.kernels.layer.lora_programs import b_of_token, early_sums, expand_token, shrink_token
from hf_fastattn.kernels.layer.skinny import skinny_product
from hf_fastattn.kernels.layer.split_sums import SplitSums
from hf_fastattn.kernels.layer.tiles import find_tile, pick, weight_tile
from hf_fastattn.kernels.rehearsal import prepared

MOST_WEIGHTS = 3


@triton.jit
def _x_tile(x_ptr, k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[BLOCK_K]` elements of x from k on, in fp32."""
    column = k + tl.arange(0, BLOCK_K)
    if K % BLOCK_K == 0:
        return tl.load(x_ptr + column).to(tl.float32)
    return tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def _products(w, x, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """`w: [BLOCK_N, BLOCK_K]` in dtype times `x: [BLOCK_K]`, VECTOR neighbours added up: `[BLOCK_N, BLOCK_K / VECTOR]`."""
    products = w.to(dtype).to(tl.float32) * x[None, :]
    if VECTOR == 1:
        return products
    return tl.sum(tl.reshape(products, (w.shape[0], w.shape[1] // VECTOR, VECTOR)), 2)


@triton.jit(do_not_specialize=["n0", "n1", "n2"])
def matvec_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, y_ptr, residual_ptr, n0, n1, n2,
    K: tl.constexpr, WEIGHTS: tl.constexpr, GATED: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
    lora=None, RANKS: tl.constexpr = None, SAME: tl.constexpr = False, RANK: tl.constexpr = 0, PARTS: tl.constexpr = 0,
    SHRINK_PART: tl.constexpr = 0, SHRINK_K: tl.constexpr = 0, SHRINKERS: tl.constexpr = 0,
    ROOM: tl.constexpr = 0, members=None,
):  # fmt: skip
    """BLOCK_N rows of one weight, or of w0 and w1 if GATED, times `x: [K]`; with adapters, what `lora.py` says."""
    if OVERLAP:
        gdc_launch_dependents()
    ADAPTERS: tl.constexpr = 2 if GATED else WEIGHTS
    number = tl.program_id(0)
    if lora is not None:
        if number < SHRINKERS:
            shrink_token(
                number, x_ptr, lora, members, K, ADAPTERS, RANKS, SAME, RANK, PARTS, SHRINK_PART, SHRINK_K, SETTLED, OVERLAP
            )  # fmt: skip
            return
        number -= SHRINKERS
    which, rows, column, tile = find_tile(number, n0, n1, n2, BLOCK_N, WEIGHTS)
    w_ptr = pick(which, w0_ptr, w1_ptr, w2_ptr, WEIGHTS)
    b_ptr = b0_ptr
    if b0_ptr is not None:
        b_ptr = pick(which, b0_ptr, b1_ptr, b2_ptr, WEIGHTS)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Instead of a mask: past the last row, the last row is read again.
    off_w = tl.minimum(n, rows - 1).to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]  # [BLOCK_N, BLOCK_K]
    if OVERLAP and not SETTLED:
        gdc_wait()
    w = weight_tile(w_ptr + off_w, 0, K, BLOCK_K)
    if GATED:
        u = weight_tile(w1_ptr + off_w, 0, K, BLOCK_K)
    if lora is not None:
        b = b_of_token(which, n, rows, lora, ADAPTERS, RANKS, SAME, RANK)
        if GATED:
            b_u = b_of_token(1, n, rows, lora, ADAPTERS, RANKS, SAME, RANK)
    if OVERLAP and SETTLED:
        gdc_wait()
    # Bias and residual are loaded early, so that their latency is hidden by the loop.
    ok = n < rows
    added = tl.zeros([BLOCK_N], tl.float32)
    if b_ptr is not None:
        added += tl.load(b_ptr + n, mask=ok, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        added += tl.load(residual_ptr + n, mask=ok, other=0.0).to(tl.float32)
    x = _x_tile(x_ptr, 0, K, BLOCK_K)  # [BLOCK_K]
    if lora is not None:
        # All but the first programs find the sums there; they come while weights are multiplied.
        sums = early_sums(which, number, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, ROOM)
        if GATED:
            sums_u = early_sums(1, number, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, ROOM)
    acc = _products(w, x, x_ptr.dtype.element_ty, VECTOR)  # [BLOCK_N, BLOCK_K / VECTOR]
    if GATED:
        acc_u = _products(u, x, x_ptr.dtype.element_ty, VECTOR)
    for k in tl.range(BLOCK_K, K, BLOCK_K, num_stages=STAGES):
        w = weight_tile(w_ptr + off_w, k, K, BLOCK_K)
        if GATED:
            u = weight_tile(w1_ptr + off_w, k, K, BLOCK_K)
        x = _x_tile(x_ptr, k, K, BLOCK_K)
        acc += _products(w, x, x_ptr.dtype.element_ty, VECTOR)
        if GATED:
            acc_u += _products(u, x, x_ptr.dtype.element_ty, VECTOR)
    y = tl.sum(acc, 1)  # [BLOCK_N]
    if lora is not None:
        y += expand_token(which, number, b, sums, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, ROOM)
    if GATED:
        y_u = tl.sum(acc_u, 1)
        if lora is not None:
            y_u += expand_token(1, number, b_u, sums_u, lora, ADAPTERS, RANKS, SAME, RANK, PARTS, ROOM)
        y = silu_gate(y, y_u)
    tl.store(y_ptr + column + n, (y + added).to(y_ptr.dtype.element_ty), mask=ok)


def _check(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, residual: Tensor | None) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES or x.stride(1) != 1 or not x.shape[1] or x.shape[0] > MOST_TOKENS:
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()}, {x.dtype}, must be [T, K] with T up to {MOST_TOKENS}, "
            f"contiguous in its last dimension, of a dtype among {DTYPES}"
        )
    if not 1 <= len(weights) <= MOST_WEIGHTS or (biases is not None and len(biases) != len(weights)):
        raise ValueError(f"{len(weights)} weights and {len(biases or ())} biases; expected 1 to 3, a bias for each or none")
    dtype, k = x.dtype, x.shape[1]
    for weight in weights:
        known = weight.dtype in (dtype, torch.float32) and weight.dtype is weights[0].dtype
        if weight.ndim != 2 or weight.shape[1] != k or not known or not weight.is_contiguous():
            raise ValueError(
                f"weight {tuple(weight.shape)}, {weight.dtype}, is not [N, {k}], contiguous, {dtype} or fp32 as the others"
            )
    for weight, bias in zip(weights, biases or (), strict=False):
        if bias.shape != weight.shape[:1] or not bias.is_contiguous():
            raise ValueError(f"bias {tuple(bias.shape)} must be [N] = {[weight.shape[0]]} and contiguous")
    if residual is not None and (
        len(weights) != 1
        or residual.shape != (x.shape[0], weights[0].shape[0])
        or residual.dtype not in (dtype, torch.float32)
        or residual.stride(1) != 1
    ):
        raise ValueError(
            f"residual {tuple(residual.shape)}, {residual.dtype}, must be as the output of a single weight, {dtype} or fp32"
        )


def _product(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, residual: Tensor | None,
    gated: bool, sums: SplitSums | None, weights_settled: bool, asks_for_l1: bool, tile: ProductTile | None,
    lora: Sequence[Adapter | None] | None, lora_sums: LoraSums | None, lora_tile: LoraTile | None,
    lora_numbers: Tensor | None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All products side by side in `[T, rows of all weights]`, or `[T, rows of one weight]` if gated."""
    _check(x, weights, biases, residual)
    if lora is not None:
        check_adapters(x, weights, lora, lora_numbers)
    tokens, k = x.shape
    counts = [weight.shape[0] for weight in weights]
    dtype = x.dtype if residual is None else residual.dtype
    shape = (tokens, counts[0] if gated else sum(counts))
    if out is not None and (out.shape != shape or out.dtype is not dtype or not out.is_contiguous()):
        raise ValueError(f"out {tuple(out.shape)}, {out.dtype}, must be {list(shape)}, {dtype}, contiguous")
    y = torch.empty(shape, dtype=dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    arch = arch_of(x.device)
    few = few_rows_tile(arch, x.element_size(), tokens, k, sum(counts), gated, False) if tile is lora is None else None
    if few is not None and few_rows.takes(x, weights, few, asks_for_l1):
        few_rows.fill_few_rows(
            x, weights, biases, residual, y, None, 0.0, False, gated, weights_settled, asks_for_l1, few
        )  # fmt: skip
        return y
    rounds = weights[0].dtype is not x.dtype
    tile = tile or product_tile(arch, x.element_size(), tokens, k, sum(counts), gated, rounds, lora is not None)
    block_t = 1 if tokens == 1 else max(power_of_2(tokens), 16)
    shrinkers, adapted = 0, dict[str, Any]()
    if lora is not None:
        room = room_beside(arch, tokens, tile, counts[:1] if gated else counts)
        shrinkers, adapted = operands(x, lora, block_t, lora_sums, lora_tile, lora_numbers, room)
    if tokens > 1:
        skinny_product(x, weights, biases, residual, y, gated, sums, weights_settled, tile, shrinkers, adapted)
        return y
    counts += [0] * (MOST_WEIGHTS - len(counts))
    used = 1 if gated else len(weights)
    spare: list[Tensor | None] = [None] * (MOST_WEIGHTS - len(weights))
    added = [*biases, *spare] if biases else [None] * MOST_WEIGHTS
    overlap = overlaps_launches(arch)
    # Not `triton.cdiv`, which costs the host a microsecond a call.
    programs = sum(-(-count // tile.block_n) for count in counts[:used])
    with on_device_of(x):
        prepared(matvec_kernel)[(shrinkers + programs,)](
            x, *weights, *spare, *added, y, residual, *counts, K=k, WEIGHTS=used, GATED=gated, VECTOR=tile.vector,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages, SETTLED=weights_settled, OVERLAP=overlap,
            num_warps=tile.warps, **adapted, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return y


def matvec(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    residual: Tensor | None = None,
    sums: SplitSums | None = None,
    weights_settled: bool = False,
    asks_for_l1: bool = False,
    tile: ProductTile | None = None,
    lora: Sequence[Adapter | None] | None = None,
    lora_sums: LoraSums | None = None,
    lora_tile: LoraTile | None = None,
    lora_numbers: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`x W^T + b`, and what an adapter adds, for up to three weights in one launch.

    Args:
        x: `[T, K]` bf16, fp16 or fp32, T up to 64, any stride between rows.
        weights: each `[N_i, K]`, contiguous, all of the dtype of x or all fp32: these are rounded to the dtype of x.
        biases: `[N_i]` for each weight, or none at all.
        residual: `[T, N]` of the dtype of x or fp32, added to the product of a single weight.
        sums: room for split products, for one stream; made by the call if needed and not given.
        weights_settled: no launch that may still be running writes a weight, so the first tiles of weights are read before
            the launch ahead has ended. Launches overlap, so the one before the last counts too.
        asks_for_l1: see `few_rows.few_rows`, which some products take.
        tile: launch configuration, for measuring; by default that of `configs.product_tile`.
        lora: an adapter for each weight, or None for those without; None if there are none at all.
        lora_sums: room for the sums of one forward's launches; made by the call if needed and not given.
        lora_tile: as `tile`; by default `lora.lora_tile`'s.
        lora_numbers: `[T]` int32, which of the adapters stacked in `lora` each token has; None if they are not stacked.
        out: `[T, N_0 + N_1 + N_2]`, contiguous, where the products go; a new tensor by default.

    Returns:
        `[T, N_i]` of each weight in the dtype of the residual, or else of x; views of one tensor `[T, N_0 + N_1 + N_2]`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    options = (sums, weights_settled, asks_for_l1, tile, lora, lora_sums, lora_tile, lora_numbers)
    y = _product(x, weights, biases, residual, False, *options, out)
    return y.split([weight.shape[0] for weight in weights], -1)


def gate_up_silu(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    *,
    sums: SplitSums | None = None,
    weights_settled: bool = False,
    asks_for_l1: bool = False,
    tile: ProductTile | None = None,
    lora: Sequence[Adapter | None] | None = None,
    lora_sums: LoraSums | None = None,
    lora_tile: LoraTile | None = None,
    lora_numbers: Tensor | None = None,
) -> Tensor:
    """`silu(x Wg^T) * (x Wu^T)`, `[T, I]`, in one launch; arguments as of `matvec`, both weights `[I, K]`."""
    if w_gate.shape != w_up.shape:
        raise ValueError(f"w_gate {tuple(w_gate.shape)} and w_up {tuple(w_up.shape)} must be of one shape")
    options = (sums, weights_settled, asks_for_l1, tile, lora, lora_sums, lora_tile, lora_numbers)
    return _product(x, (w_gate, w_up), None, None, True, *options)
