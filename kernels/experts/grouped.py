"""The experts of many tokens: pairs of a token and an expert, sorted by expert on the device, and grouped products.

The router has counted the pairs of each expert (`Routing.counts`) and numbered them (`ranks`); a small launch writes them
down in the order of their experts, and the tiles of them that are the products' work (`work_list.py`), so the host never
waits for the device. Experts with few pairs, most of them, get a narrow tile; one with many gets wide ones, lest its weights
be read once for each of many narrow ones. gate and up take rows of x by the pair's token and leave the states in sorted
order; down takes them in that order, multiplies by the pair's weight and gives the products back in the order of the tokens,
where the last launch adds them up, in fixed order, with residual and shared expert. The plain PyTorch versions are in
`reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.experts.checks import check_down, check_gate_up
from hf_fastattn.kernels.experts.configs import GROUPED_PROGRAMS, GroupedTile, grouped_tile
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.experts.several_tokens import add_product
from hf_fastattn.kernels.experts.work_list import WorkList, empty_list, list_tiles, work_item
from hf_fastattn.kernels.launch import arch_of, dot_precision, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.activation import silu_gate
from hf_fastattn.kernels.rehearsal import prepared

# Pairs that a program of the sorting launch writes, and outputs that one of the last launch adds up.
BLOCK_PAIRS = 64
BLOCK_OUT = 1024


@triton.jit(do_not_specialize=["pairs", "blocks"])
def sort_pairs_kernel(
    chosen_ptr, ranks_ptr, counts_ptr, sorted_ptr, tiles_ptr, count_ptr, pairs, blocks,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write BLOCK pairs to their places in the order of the experts; behind the last of them, the tiles of an expert."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0)  # [BLOCK_E]
    if number < blocks:
        pair = number * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        ok = pair < pairs
        begins = tl.cumsum(counts, 0) - counts
        expert = tl.load(chosen_ptr + pair, mask=ok, other=0)
        begin = tl.sum(tl.where(expert[:, None] == e[None, :], begins[None, :], 0), 1)
        tl.store(sorted_ptr + begin + tl.load(ranks_ptr + pair, mask=ok, other=0), pair, mask=ok)
    else:
        list_tiles(counts, e, number - blocks, tiles_ptr, count_ptr, E, BLOCK_M)


@triton.jit
def _multiply(
    x_ptr, w_ptr, y_ptr, order_ptr, weights_ptr, stride_x, expert, column, begin, size,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_M pairs of one expert times BLOCK_N rows of its weight `[ROWS, WIDTH]`, of gate and up if GATED."""
    m = tl.arange(0, BLOCK_M)
    ok_m = m < size
    pair = tl.load(order_ptr + begin + m, mask=ok_m, other=0)  # [BLOCK_M]
    row = (pair // K if GATED else begin + m).to(tl.int64)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
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
def grouped_kernel(
    x_ptr, w_ptr, y_ptr, tiles_ptr, count_ptr, order_ptr, weights_ptr, stride_x,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, NARROW: tl.constexpr, NARROW_K: tl.constexpr,
    NARROW_STAGES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Items of the work list: tiles of NARROW pairs for experts that have no more, and of BLOCK_M for the others."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    COLUMNS: tl.constexpr = (ROWS + BLOCK_N - 1) // BLOCK_N
    items = tl.load(count_ptr) * COLUMNS
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        expert, column, begin, size, count = work_item(tiles_ptr, item, COLUMNS, BLOCK_M)
        if NARROW == 0 or count > NARROW:
            _multiply(
                x_ptr, w_ptr, y_ptr, order_ptr, weights_ptr, stride_x, expert, column, begin, size,
                ROWS, WIDTH, K, GATED, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PRECISION,
            )  # fmt: skip
        else:
            _multiply(
                x_ptr, w_ptr, y_ptr, order_ptr, weights_ptr, stride_x, expert, column, begin, size,
                ROWS, WIDTH, K, GATED, NARROW, BLOCK_N, NARROW_K, NARROW_STAGES, PRECISION,
            )  # fmt: skip


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


def sort_pairs(routing: Routing, block_m: int) -> WorkList:
    """The pairs of a token and an expert in the order of the experts, and tiles of up to `block_m` of them."""
    assert routing.counts is not None
    pairs, experts = routing.chosen.numel(), routing.counts.shape[0]
    blocks = -(-pairs // BLOCK_PAIRS)
    work = empty_list(routing, block_m)
    overlap = overlaps_launches(arch_of(work.order.device))
    with on_device_of(work.order):
        prepared(sort_pairs_kernel)[(blocks + experts,)](
            routing.chosen, routing.ranks, routing.counts, *work[:3], pairs, blocks,
            E=experts, BLOCK_M=block_m, BLOCK_E=power_of_2(experts), BLOCK=BLOCK_PAIRS, OVERLAP=overlap,
            num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return work


def _grouped(x: Tensor, weight: Tensor, routing: Routing, work: WorkList, gated: bool, tile: GroupedTile | None) -> Tensor:
    experts, rows, width = weight.shape
    rows = rows // 2 if gated else rows
    tokens, top_k = routing.chosen.shape
    y = torch.empty((tokens * top_k, rows), dtype=x.dtype, device=x.device)
    arch = arch_of(x.device)
    tile = tile or grouped_tile(arch, x.element_size(), tokens, top_k, experts, gated)
    assert tile.block_m == work.block_m
    items = work.tiles.shape[0] * -(-rows // tile.block_n)
    overlap = overlaps_launches(arch)
    with on_device_of(x):
        prepared(grouped_kernel)[(min(items, GROUPED_PROGRAMS),)](
            x, weight, y, work.tiles, work.tile_count, work.order, routing.weights, x.stride(0),
            ROWS=rows, WIDTH=width, K=top_k, GATED=gated, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            STAGES=tile.stages, NARROW=tile.narrow, NARROW_K=tile.narrow_k, NARROW_STAGES=tile.narrow_stages,
            PRECISION=dot_precision(x.dtype), OVERLAP=overlap, num_warps=tile.warps,
            **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return y


def gate_up_silu(
    x: Tensor, routing: Routing, work: WorkList, gate_up_proj: Tensor, *, tile: GroupedTile | None = None
) -> Tensor:
    """`silu(gate) * up` of every pair, in sorted order.

    Args:
        x: `[T, H]` bf16, fp16 or fp32, any stride between rows.
        routing: with `counts`.
        work: of `sort_pairs`, with tiles of `configs.pairs_a_tile`.
        gate_up_proj: `[E, 2 I, H]`, contiguous, of the dtype of x.
        tile: launch configuration, for measuring; by default that of `configs.grouped_tile`.

    Returns:
        `[T * K, I]`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_gate_up(x, routing, gate_up_proj)
    return _grouped(x, gate_up_proj, routing, work, True, tile)


def down_sum(
    states: Tensor,
    routing: Routing,
    work: WorkList,
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
    return combine(_grouped(states, down_proj, routing, work, False, tile), routing, residual, shared)


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
