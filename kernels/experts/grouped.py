"""The experts of many tokens: pairs of a token and an expert, sorted by expert on the device, and grouped products.

The router has counted the pairs of each expert (`Routing.counts`) and numbered them (`ranks`); a small launch writes them
down in the order of their experts. A program of a product finds its tile of pairs from its program id and these counts, so
the host never waits for the device: it launches as many programs as could ever be needed, and those without a tile end at
once. gate and up take rows of x by the pair's token and leave the states in sorted order; down takes them in that order,
multiplies by the pair's weight and gives the products back in the order of the tokens, where the last launch adds them up,
in fixed order, with residual and shared expert. The plain PyTorch versions are in `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.experts.checks import check_down, check_gate_up
from hf_fastattn.kernels.experts.configs import GroupedTile, grouped_tile
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.experts.several_tokens import add_product
from hf_fastattn.kernels.launch import arch_of, dot_precision, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.rehearsal import prepared

# Pairs that a program of the sorting launch writes, and outputs that one of the last launch adds up.
BLOCK_PAIRS = 64
BLOCK_OUT = 1024


@triton.jit
def _begins(counts_ptr, e, E: tl.constexpr):
    """Pairs of each expert, and where they begin in the sorted order: both `[BLOCK_E]`."""
    counts = tl.load(counts_ptr + e, mask=e < E, other=0)
    return counts, tl.cumsum(counts, 0) - counts


@triton.jit(do_not_specialize=["pairs"])
def sort_pairs_kernel(
    chosen_ptr, ranks_ptr, counts_ptr, sorted_ptr, pairs,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write BLOCK pairs to their places in the order of the experts."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    ok = pair < pairs
    e = tl.arange(0, BLOCK_E)
    _, begins = _begins(counts_ptr, e, E)
    expert = tl.load(chosen_ptr + pair, mask=ok, other=0)
    begin = tl.sum(tl.where(expert[:, None] == e[None, :], begins[None, :], 0), 1)
    tl.store(sorted_ptr + begin + tl.load(ranks_ptr + pair, mask=ok, other=0), pair, mask=ok)


@triton.jit
def _find_tile(counts_ptr, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile (E where there is none), its first place in the sorted order, and how many pairs it holds."""
    e = tl.arange(0, BLOCK_E)
    counts, begins = _begins(counts_ptr, e, E)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, 0)
    expert = tl.minimum(tl.sum((upto <= tile).to(tl.int32), 0), E)
    here = e == expert
    first = (tile - tl.sum(tl.where(here, upto - tiles, 0), 0)) * BLOCK_M
    size = tl.minimum(tl.sum(tl.where(here, counts, 0), 0) - first, BLOCK_M)
    return expert, tl.sum(tl.where(here, begins, 0), 0) + first, size


@triton.jit
def grouped_kernel(
    x_ptr, w_ptr, y_ptr, counts_ptr, sorted_ptr, weights_ptr, stride_x,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pairs of one expert times BLOCK_N rows of its weight `[ROWS, WIDTH]`, of gate and up if GATED."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    expert, begin, size = _find_tile(counts_ptr, tl.program_id(1), E, BLOCK_E, BLOCK_M)
    if expert == E:
        return
    m = tl.arange(0, BLOCK_M)
    ok_m = m < size
    pair = tl.load(sorted_ptr + begin + m, mask=ok_m, other=0)  # [BLOCK_M]
    row = (pair // K if GATED else begin + m).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    inner = tl.arange(0, BLOCK_K)[None, :]
    x_tile_ptr = x_ptr + row[:, None] * stride_x + inner  # [BLOCK_M, BLOCK_K]
    # Instead of a mask: past the last row, the last row is read again.
    w_tile_ptr = w_ptr + expert.to(tl.int64) * ((2 if GATED else 1) * ROWS * WIDTH)
    w_tile_ptr += tl.minimum(n, ROWS - 1)[:, None] * WIDTH + inner  # [BLOCK_N, BLOCK_K]
    EVEN: tl.constexpr = WIDTH % BLOCK_K == 0
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = acc
    lost = acc
    lost_up = acc
    for k in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        if EVEN:
            x = tl.load(x_tile_ptr + k, mask=ok_m[:, None], other=0.0)
            w = tl.load(w_tile_ptr + k)
            if GATED:
                up = tl.load(w_tile_ptr + ROWS * WIDTH + k)
        else:
            ok_k = k + inner < WIDTH
            x = tl.load(x_tile_ptr + k, mask=ok_m[:, None] & ok_k, other=0.0)
            w = tl.load(w_tile_ptr + k, mask=ok_k, other=0.0)
            if GATED:
                up = tl.load(w_tile_ptr + ROWS * WIDTH + k, mask=ok_k, other=0.0)
        x = tl.trans(x)  # [BLOCK_K, BLOCK_M]
        acc, lost = add_product(acc, lost, w, x, PRECISION)
        if GATED:
            acc_up, lost_up = add_product(acc_up, lost_up, up, x, PRECISION)
    if GATED:
        y = tl.trans(silu_gate(acc, acc_up))
        to = (begin + m).to(tl.int64)
    else:
        y = tl.trans(acc) * tl.load(weights_ptr + pair, mask=ok_m, other=0.0)[:, None]
        to = pair.to(tl.int64)
    ok = ok_m[:, None] & (n < ROWS)[None, :]
    tl.store(y_ptr + to[:, None] * ROWS + n[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def combine_kernel(
    products_ptr, residual_ptr, shared_ptr, gate_ptr, y_ptr, stride_r, stride_s,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of one token: the sum of the products of its experts, and what is added to it."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    ok = column < H
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(K):
        total += tl.load(products_ptr + (t * K + number) * H + column, mask=ok, other=0.0).to(tl.float32)
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + t * stride_s + column, mask=ok, other=0.0).to(tl.float32)
        total += shared / (1.0 + tl.exp(-tl.load(gate_ptr + t)))
    if residual_ptr is not None:
        total += tl.load(residual_ptr + t * stride_r + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * H + column, total.to(y_ptr.dtype.element_ty), mask=ok)


def sort_pairs(routing: Routing) -> Tensor:
    """`[T * K]` int32: the numbers of all pairs of a token and an expert, in the order of the experts."""
    assert routing.counts is not None
    pairs, experts = routing.chosen.numel(), routing.counts.shape[0]
    order = torch.empty(pairs, dtype=torch.int32, device=routing.chosen.device)
    overlap = overlaps_launches(arch_of(order.device))
    with on_device_of(order):
        prepared(sort_pairs_kernel)[(-(-pairs // BLOCK_PAIRS),)](
            routing.chosen, routing.ranks, routing.counts, order, pairs,
            E=experts, BLOCK_E=power_of_2(experts), BLOCK=BLOCK_PAIRS, OVERLAP=overlap,
            num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return order


def _grouped(x: Tensor, weight: Tensor, routing: Routing, order: Tensor, gated: bool, tile: GroupedTile | None) -> Tensor:
    assert routing.counts is not None
    experts, rows, width = weight.shape
    rows = rows // 2 if gated else rows
    pairs, top_k = order.shape[0], routing.chosen.shape[1]
    y = torch.empty((pairs, rows), dtype=x.dtype, device=x.device)
    arch = arch_of(x.device)
    tile = tile or grouped_tile(arch, x.element_size(), pairs, experts, gated)
    # No expert has more than one tile that is not full.
    most = pairs // tile.block_m + min(experts, pairs)
    overlap = overlaps_launches(arch)
    with on_device_of(x):
        prepared(grouped_kernel)[(-(-rows // tile.block_n), most)](
            x, weight, y, routing.counts, order, routing.weights, x.stride(0),
            ROWS=rows, WIDTH=width, E=experts, K=top_k, GATED=gated, BLOCK_E=power_of_2(experts), BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages, PRECISION=dot_precision(x.dtype),
            OVERLAP=overlap, num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return y


def gate_up_silu(
    x: Tensor, routing: Routing, order: Tensor, gate_up_proj: Tensor, *, tile: GroupedTile | None = None
) -> Tensor:
    """`silu(gate) * up` of every pair, in sorted order.

    Args:
        x: `[T, H]` bf16, fp16 or fp32, any stride between rows.
        routing: with `counts`.
        order: of `sort_pairs`.
        gate_up_proj: `[E, 2 I, H]`, contiguous, of the dtype of x.
        tile: launch configuration, for measuring; by default that of `configs.grouped_tile`.

    Returns:
        `[T * K, I]`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_gate_up(x, routing, gate_up_proj)
    return _grouped(x, gate_up_proj, routing, order, True, tile)


def down_sum(
    states: Tensor,
    routing: Routing,
    order: Tensor,
    down_proj: Tensor,
    *,
    residual: Tensor | None = None,
    shared: Tensor | None = None,
    tile: GroupedTile | None = None,
) -> Tensor:
    """The weighted sum over the experts of each token, `[T, H]`; `states: [T * K, I]` and the rest as of `few.down_sum`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    tokens, top_k = routing.chosen.shape
    check_down(states.view(tokens, top_k, -1), routing, down_proj, residual, shared)
    return combine(_grouped(states, down_proj, routing, order, False, tile), routing, residual, shared)


def combine(products: Tensor, routing: Routing, residual: Tensor | None, shared: Tensor | None) -> Tensor:
    """The sum over the experts of each token, `[T, H]`, of weighted `products: [T * K, H]`, and what is added to it."""
    (tokens, top_k), hidden = routing.chosen.shape, products.shape[1]
    y = torch.empty((tokens, hidden), dtype=products.dtype, device=products.device)
    overlap = overlaps_launches(arch_of(products.device))
    with on_device_of(products):
        prepared(combine_kernel)[(tokens, -(-hidden // BLOCK_OUT))](
            products, residual, shared, None if shared is None else routing.gate, y,
            0 if residual is None else residual.stride(0), 0 if shared is None else shared.stride(0),
            H=hidden, K=top_k, BLOCK=min(BLOCK_OUT, power_of_2(hidden)), OVERLAP=overlap,
            num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return y
