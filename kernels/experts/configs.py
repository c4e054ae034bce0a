"""Tiles of the experts' products, as data.

Measured on an H200 with 16-bit weights of Qwen3-30B-A3B's and Mixtral-8x7B's shapes, read from memory. Other GPUs' follow
from what was quickest there for dense products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.kernels.layer.configs import HOPPER, ProductTile

# Up to so many tokens an expert's weights are read once for all of them; more tokens are sorted by expert.
FEW_TOKENS = 16
# Tiles of weight rows times splits are at most so many programs: as many as a Hopper GPU runs at once.
PROGRAMS = 264
MOST_SPLITS = 16
# Up to so many columns a row of down is one step for one token, and up to so many of all its experts are asked for at once.
SHORT_ROW, AT_ONCE = 1024, 8192

# From so many pairs an expert on, on average, or so many tokens, of which some experts may have many, the Gluon kernels of
# `hopper_grouped.py` are quicker.
HOPPER_PAIRS, HOPPER_TOKENS = 64, 1024


# Programs of a grouped product are at most so many, and take its items in turn: as many as the list might have would be
# thousands that find nothing, where all tokens go to few experts.
GROUPED_PROGRAMS = 4 * PROGRAMS


@dataclass(frozen=True)
class GroupedTile:
    """Launch configuration of a product of many tokens, sorted by expert.

    Attributes:
        block_m: pairs of a token and an expert a program.
        block_n: weight rows a program, of each of gate and up.
        block_k: columns a step.
        warps: warps a program.
        stages: pipeline stages of the loads.
        narrow: pairs a program for experts that have no more than so many; 0: `block_m` for all.
        narrow_k, narrow_stages: columns a step and stages then.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    narrow: int = 0
    narrow_k: int = 64
    narrow_stages: int = 2


# (pairs an expert up to, gated) -> pairs, weight rows, columns a step, warps and stages, for 16-bit weights on Hopper
GROUPED: dict[tuple[int, bool], tuple[int, int, int, int, int]] = {
    (12, True): (16, 64, 128, 4, 3),
    (12, False): (16, 64, 128, 4, 4),
    (24, True): (32, 64, 128, 4, 3),
    (24, False): (32, 64, 128, 4, 4),
    (96, True): (64, 64, 64, 4, 4),
    (96, False): (64, 128, 64, 8, 3),
}
# For so many pairs an expert on average, of more tokens than so many, tiles of 64 pairs alone are quicker than with wider
# ones in the same kernel, which take twice the registers.
SEVERAL_PAIRS, SEVERAL_TOKENS = range(25, 97), 256
# Columns a step of wider tiles, and stages by their pairs.
WIDE_K, WIDE_STAGES = 64, {64: 4, 128: 3}


@functools.cache
def gate_up_tile(arch: int, itemsize: int, tokens: int, k: int, rows: int) -> ProductTile:
    """The tile of gate and up for few tokens.

    Args:
        itemsize: bytes of an element.
        k: columns of the weights (H).
        rows: rows of gate, and as many of up (I).
    """
    if tokens == 1:
        wide = min(2048 if itemsize == 2 else 1024, _columns(k))
        return ProductTile(2, wide, 8 if wide >= 2048 else 4, 2, vector=8 if itemsize == 2 else 1)
    if itemsize == 4:
        return ProductTile(16, 32, 4, 2)
    stages = 3 if arch >= HOPPER else 2
    # Rows enough that two tokens keep every processor busy.
    return ProductTile(32, 128, 4, stages + 1) if tokens == 2 and rows < 4096 else ProductTile(64, 128, 4, stages)


@functools.cache
def down_tile(arch: int, itemsize: int, tokens: int, k: int, rows: int, top_k: int) -> ProductTile:
    """The tile of down for few tokens; arguments as of `gate_up_tile`, k is I and rows are H."""
    if tokens == 1:
        if itemsize == 2 and arch >= HOPPER and k <= SHORT_ROW:
            wide = power_of_2(k)
            at_once = wide * power_of_2(top_k) <= AT_ONCE
            return ProductTile(2, wide, 4, 1) if at_once else ProductTile(4, wide, 8, 4)
        return ProductTile(4, min(512 if itemsize == 2 else 256, _columns(k)), 4, 6)
    # The number of an expert is read a step ahead of its weights: half of the stages hold no weights.
    if itemsize == 4:
        tile = ProductTile(32, 32, 4, 4)
    elif arch >= HOPPER:
        tile = ProductTile(64, 128, 4, 8) if tokens <= 8 and k <= 2 * SHORT_ROW else ProductTile(128, 128, 8, 6)
    else:
        tile = ProductTile(64, 128, 4, 4)
    tiles = -(-rows // tile.block_n)
    return replace(tile, split=max(1, min(MOST_SPLITS, PROGRAMS // tiles)))


def _columns(k: int) -> int:
    """The largest power of two whose multiple k is, or 256 where that would be less."""
    return max(k & -k, 256)


@functools.cache
def pairs_a_tile(arch: int, itemsize: int, tokens: int, top_k: int, experts: int) -> int:
    """Pairs of a token and one expert in a tile of the work list: all that an expert can have, if they are not too many."""
    mean = -(-tokens * top_k // experts)
    if itemsize == 4:
        return 16 if mean <= 12 else 32
    if arch < HOPPER or tokens <= 64:
        return 64
    return 64 if mean in SEVERAL_PAIRS and tokens > SEVERAL_TOKENS else 128


@functools.cache
def grouped_tile(arch: int, itemsize: int, tokens: int, top_k: int, experts: int, gated: bool) -> GroupedTile:
    """The tile of a grouped product of so many tokens, each with `top_k` of the experts."""
    block_m = pairs_a_tile(arch, itemsize, tokens, top_k, experts)
    if itemsize == 4:
        return GroupedTile(block_m, 32, 32, 4, 2)
    mean = -(-tokens * top_k // experts)
    found = next((tile for (most, kind), tile in GROUPED.items() if mean <= most and kind == gated), None)
    if arch < HOPPER:
        # An estimate, whose shared memory fits desktop GPUs too.
        narrow = 0 if found is None or found[0] == block_m else found[0]
        return GroupedTile(block_m, 32 if gated else 64, 64, 4, 3, narrow, 64, 3)
    if found is None:
        return GroupedTile(block_m, 64, WIDE_K, 4, WIDE_STAGES[block_m])
    narrow, block_n, narrow_k, warps, narrow_stages = found
    if narrow == block_m:
        return GroupedTile(block_m, block_n, narrow_k, warps, narrow_stages)
    return GroupedTile(block_m, block_n, WIDE_K, warps, WIDE_STAGES[block_m], narrow, narrow_k, narrow_stages)
