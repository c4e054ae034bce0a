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

# From so many pairs an expert on, on average, the Gluon kernels of `hopper_grouped.py` are quicker.
HOPPER_PAIRS = 64


@dataclass(frozen=True)
class GroupedTile:
    """Launch configuration of a product of many tokens, sorted by expert.

    Attributes:
        block_m: pairs of a token and an expert a program.
        block_n: weight rows a program, of each of gate and up.
        block_k: columns a step.
        warps: warps a program.
        stages: pipeline stages of the loads.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


# (pairs an expert up to, gated) -> tile, for 16-bit weights on Hopper
GROUPED: dict[tuple[int, bool], GroupedTile] = {
    (12, True): GroupedTile(16, 64, 128, 4, 3),
    (12, False): GroupedTile(16, 64, 128, 4, 4),
    (24, True): GroupedTile(32, 64, 128, 4, 3),
    (24, False): GroupedTile(32, 64, 128, 4, 4),
    (96, True): GroupedTile(64, 64, 64, 4, 4),
    (96, False): GroupedTile(64, 128, 64, 8, 3),
}
# Above the largest of them.
GROUPED_MANY = GroupedTile(128, 64, 64, 4, 3)


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
def grouped_tile(arch: int, itemsize: int, pairs: int, experts: int, gated: bool) -> GroupedTile:
    """The tile of a grouped product of so many pairs of a token and one of the experts."""
    mean = -(-pairs // experts)
    if itemsize == 4:
        return GroupedTile(16 if mean <= 12 else 32, 32, 32, 4, 2)
    tile = next((tile for (most, kind), tile in GROUPED.items() if mean <= most and kind == gated), GROUPED_MANY)
    if arch >= HOPPER:
        return tile
    # An estimate, whose shared memory fits desktop GPUs too.
    return GroupedTile(min(tile.block_m, 64), 64 if not gated else 32, 64, 4, 3)
