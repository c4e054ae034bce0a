"""Pairs of a token and an expert in the order of their experts, and tiles of them as a list, made on the device.

An entry of the list is a tile of up to BLOCK_M pairs of one expert; it names the expert, the first tile and the first pair
of the expert, and how many pairs the expert has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.experts.grouped import BLOCK_PAIRS, place_pairs
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches, power_of_2

BLOCK_TILES = 64


class ExpertTiles(NamedTuple):
    """Tiles of pairs of one expert each.

    Attributes:
        order: `[T * K]` int32, the numbers of the pairs in the order of their experts.
        tiles: `[up to this many, 4]` int32, the list.
        tile_count: `[1]` int32, how many tiles there are.
    """

    order: Tensor
    tiles: Tensor
    tile_count: Tensor


@triton.jit(do_not_specialize=["pairs", "blocks"])
def list_tiles_kernel(
    chosen_ptr, ranks_ptr, counts_ptr, order_ptr, tiles_ptr, tile_count_ptr, pairs, blocks,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The places of BLOCK pairs; behind the last pair, the tiles of an expert."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    number = tl.program_id(0)
    if number < blocks:
        place_pairs(chosen_ptr, ranks_ptr, counts_ptr, order_ptr, number, pairs, E, BLOCK_E, BLOCK)
    else:
        e = tl.arange(0, BLOCK_E)
        counts = tl.load(counts_ptr + e, mask=e < E, other=0)  # [BLOCK_E]
        expert = number - blocks
        tiles = (counts + BLOCK_M - 1) // BLOCK_M
        first = tl.sum(tl.where(e < expert, tiles, 0), 0)
        begin = tl.sum(tl.where(e < expert, counts, 0), 0)
        size = tl.sum(tl.where(e == expert, counts, 0), 0)
        end = first + (size + BLOCK_M - 1) // BLOCK_M
        for at in tl.range(first, end, BLOCK_T):
            tile = at + tl.arange(0, BLOCK_T)
            entry = tiles_ptr + tile * 4
            ok = tile < end
            tl.store(entry, expert, mask=ok)
            tl.store(entry + 1, first, mask=ok)
            tl.store(entry + 2, begin, mask=ok)
            tl.store(entry + 3, size, mask=ok)
        if expert == E - 1:
            tl.store(tile_count_ptr, end)


def list_tiles(routing: Routing, block_m: int) -> ExpertTiles:
    """The order of the pairs of a routing with `counts`, and tiles of up to `block_m` of them."""
    assert routing.counts is not None and routing.ranks is not None
    pairs, experts, device = routing.chosen.numel(), routing.counts.shape[0], routing.chosen.device

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    # No expert has more than one tile that is not full.
    work = ExpertTiles(numbers(pairs), numbers(pairs // block_m + min(experts, pairs), 4), numbers(1))
    overlap, blocks = overlaps_launches(arch_of(device)), -(-pairs // BLOCK_PAIRS)
    with on_device_of(routing.chosen):
        list_tiles_kernel[(blocks + experts,)](
            routing.chosen, routing.ranks, routing.counts, *work, pairs, blocks,
            E=experts, BLOCK_E=power_of_2(experts), BLOCK=BLOCK_PAIRS, BLOCK_M=block_m, BLOCK_T=BLOCK_TILES,
            OVERLAP=overlap, num_warps=4, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return work
