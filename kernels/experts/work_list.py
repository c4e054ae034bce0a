"""The work list of products sorted by expert: which pairs of a token and an expert a program multiplies, made on the device.

An entry is a tile of up to BLOCK_M pairs of one expert; it names the expert, the first tile and the first pair of the
expert, and how many pairs the expert has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.experts.routing import Routing

BLOCK_TILES = tl.constexpr(64)


class WorkList(NamedTuple):
    """Tiles of pairs of one expert each.

    Attributes:
        order: `[T * K]` int32, the numbers of the pairs in the order of their experts.
        tiles: `[up to this many, 4]` int32, the list.
        tile_count: `[1]` int32, how many tiles there are.
        block_m: the most pairs of a tile.
    """

    order: Tensor
    tiles: Tensor
    tile_count: Tensor
    block_m: int


def empty_list(routing: Routing, block_m: int) -> WorkList:
    """Room for the list of a routing with `counts`."""
    assert routing.counts is not None
    (tokens, top_k), experts = routing.chosen.shape, routing.counts.shape[0]
    pairs = tokens * top_k

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=routing.chosen.device)

    # No expert has more than one tile that is not full, and none has more pairs than there are tokens.
    most = min(pairs // block_m + min(experts, pairs), experts * -(-tokens // block_m))
    return WorkList(numbers(pairs), numbers(most, 4), numbers(1), block_m)


@triton.jit
def list_tiles(counts, e, expert, tiles_ptr, count_ptr, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write the tiles of one expert, by the pairs of all, `counts: [BLOCK_E]`, where `e` are their numbers."""
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    begin = tl.sum(tl.where(e < expert, counts, 0), 0)
    size = tl.sum(tl.where(e == expert, counts, 0), 0)
    end = first + (size + BLOCK_M - 1) // BLOCK_M
    for at in tl.range(first, end, BLOCK_TILES):
        tile = at + tl.arange(0, BLOCK_TILES)
        entry = tiles_ptr + tile * 4
        ok = tile < end
        tl.store(entry, expert, mask=ok)
        tl.store(entry + 1, first, mask=ok)
        tl.store(entry + 2, begin, mask=ok)
        tl.store(entry + 3, size, mask=ok)
    if expert == E - 1:
        tl.store(count_ptr, end)


@triton.jit
def work_item(tiles_ptr, item, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a work item, number of its tile of weight rows, its first pair, its pairs, and those of the expert.

    A tile of pairs has COLUMNS items. Those of one expert that share weight rows are neighbours.
    """
    entry = tiles_ptr + item // COLUMNS * 4
    expert = tl.load(entry)
    first = tl.load(entry + 1)
    begin = tl.load(entry + 2)
    count = tl.load(entry + 3)
    inside = item - first * COLUMNS
    height = (count + BLOCK_M - 1) // BLOCK_M
    m = inside % height * BLOCK_M
    return expert, inside // height, begin + m, tl.minimum(count - m, BLOCK_M), count
