"""Rows of x in the order of their experts, and the work list of the products behind them, made on the device in one launch.

TMA reads boxes of neighbouring rows, so the kernels of `hopper_grouped.py` want a copy of x with a row for each pair of a
token and an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.experts.work_list import WorkList, empty_list, list_tiles
from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.rehearsal import prepared

MOST_COLUMNS = 2048


@triton.jit(do_not_specialize=["tokens"])
def sort_rows_kernel(
    x_ptr, chosen_ptr, ranks_ptr, counts_ptr, rows_ptr, order_ptr, tiles_ptr, count_ptr, tokens, stride_x,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The copies of a token's row; behind the last token, the tiles of an expert."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0)  # [BLOCK_E]
    if number < tokens:
        for slot in tl.range(0, K):
            pair = number * K + slot
            before = tl.sum(tl.where(e < tl.load(chosen_ptr + pair), counts, 0), 0)
            place = before + tl.load(ranks_ptr + pair)
            tl.store(order_ptr + place, pair)
            for h in tl.range(0, H, BLOCK_H):
                column = h + tl.arange(0, BLOCK_H)
                row = tl.load(x_ptr + number.to(tl.int64) * stride_x + column, mask=column < H, other=0.0)
                tl.store(rows_ptr + place.to(tl.int64) * H + column, row, mask=column < H)
    else:
        list_tiles(counts, e, number - tokens, tiles_ptr, count_ptr, E, BLOCK_M)


def sort_rows(x: Tensor, routing: Routing, block_m: int) -> tuple[Tensor, WorkList]:
    """Rows of `x: [T, H]` by expert, `[T * K, H]`, and tiles of up to `block_m` of them; the routing has `counts`."""
    assert routing.counts is not None and routing.ranks is not None
    (tokens, hidden), experts = x.shape, routing.counts.shape[0]
    rows = torch.empty((routing.chosen.numel(), hidden), dtype=x.dtype, device=x.device)
    work = empty_list(routing, block_m)
    overlap = overlaps_launches(arch_of(x.device))
    with on_device_of(x):
        prepared(sort_rows_kernel)[(tokens + experts,)](
            x, routing.chosen, routing.ranks, routing.counts, rows, *work[:3], tokens, x.stride(0),
            H=hidden, E=experts, K=routing.chosen.shape[1], BLOCK_M=block_m, BLOCK_E=power_of_2(experts),
            BLOCK_H=min(power_of_2(hidden), MOST_COLUMNS), OVERLAP=overlap, num_warps=4,
            **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return rows, work
