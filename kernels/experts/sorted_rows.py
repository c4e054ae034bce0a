"""Rows of x in the order of their experts, and the work list of the products behind them, made on the device in one launch.

TMA reads boxes of neighbouring rows, so the kernels of `hopper_grouped.py` want a copy of x with a row for each pair of a
token and an expert. An entry of the list is a tile of up to BLOCK_M pairs of one expert; it names the expert, the first
tile and the first pair of the expert, and how many pairs the expert has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches, power_of_2

MOST_COLUMNS = 2048


@triton.jit(do_not_specialize=["tokens"])
def sort_rows_kernel(
    x_ptr, chosen_ptr, ranks_ptr, counts_ptr, rows_ptr, order_ptr, work_ptr, count_ptr, tokens, stride_x,
    H: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr,
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
        expert = number - tokens
        tiles = (counts + BLOCK_M - 1) // BLOCK_M
        first = tl.sum(tl.where(e < expert, tiles, 0), 0)
        begin = tl.sum(tl.where(e < expert, counts, 0), 0)
        size = tl.sum(tl.where(e == expert, counts, 0), 0)
        end = first + (size + BLOCK_M - 1) // BLOCK_M
        for at in tl.range(first, end, BLOCK_T):
            tile = at + tl.arange(0, BLOCK_T)
            entry = work_ptr + tile * 4
            ok = tile < end
            tl.store(entry, expert, mask=ok)
            tl.store(entry + 1, first, mask=ok)
            tl.store(entry + 2, begin, mask=ok)
            tl.store(entry + 3, size, mask=ok)
        if expert == E - 1:
            tl.store(count_ptr, end)


def sort_rows(x: Tensor, routing: Routing, block_m: int) -> tuple[Tensor, WorkList]:
    """Rows of `x: [T, H]` by expert, `[T * K, H]`, and tiles of up to `block_m` of them; the routing has `counts`."""
    assert routing.counts is not None and routing.ranks is not None
    (tokens, hidden), pairs, experts = x.shape, routing.chosen.numel(), routing.counts.shape[0]

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=x.device)

    rows = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    # No expert has more than one tile that is not full.
    work = WorkList(numbers(pairs), numbers(pairs // block_m + min(experts, pairs), 4), numbers(1), block_m)
    overlap = overlaps_launches(arch_of(x.device))
    with on_device_of(x):
        sort_rows_kernel[(tokens + experts,)](
            x, routing.chosen, routing.ranks, routing.counts, rows, *work[:3], tokens, x.stride(0),
            H=hidden, E=experts, K=routing.chosen.shape[1], BLOCK_M=block_m, BLOCK_E=power_of_2(experts),
            BLOCK_H=min(power_of_2(hidden), MOST_COLUMNS), BLOCK_T=BLOCK_TILES, OVERLAP=overlap, num_warps=4,
            **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return rows, work
