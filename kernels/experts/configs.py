"""Tiles of the experts' products, as data. None is measured yet: they follow from what was quickest for dense products."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hf_fastattn.kernels.layer.configs import HOPPER, ProductTile

# Up to so many tokens an expert's weights are read once for all of them; more tokens are sorted by expert.
FEW_TOKENS = 16
# Tiles of weight rows times splits should be about so many programs.
PROGRAMS = 264
MOST_SPLITS = 16


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
    (48, True): GroupedTile(32, 64, 128, 4, 3),
    (48, False): GroupedTile(32, 64, 128, 4, 4),
    (96, True): GroupedTile(64, 64, 64, 4, 4),
    (96, False): GroupedTile(64, 128, 64, 4, 4),
}
# Above the largest of them.
GROUPED_MANY = {True: GroupedTile(128, 64, 64, 8, 4), False: GroupedTile(128, 128, 64, 8, 4)}


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
    # Rows enough that two tokens keep every processor busy.
    return ProductTile(32 if tokens <= 4 and rows < 4096 else 64, 128, 4, 3 if arch >= HOPPER else 2)


@functools.cache
def down_tile(arch: int, itemsize: int, tokens: int, k: int, rows: int) -> ProductTile:
    """The tile of down for few tokens; arguments as of `gate_up_tile`, k is I and rows are H."""
    if tokens == 1:
        return ProductTile(4, min(512 if itemsize == 2 else 256, _columns(k)), 4, 6)
    block_n, block_k = (32, 32) if itemsize == 4 else (64, 128)
    split = max(1, min(MOST_SPLITS, -(-PROGRAMS * block_n // rows)))
    # The number of an expert is read a step ahead of its weights: half of the stages hold no weights.
    return ProductTile(block_n, block_k, 4, 8 if arch >= HOPPER and itemsize == 2 else 4, split)


def _columns(k: int) -> int:
    """The largest power of two whose multiple k is, or 256 where that would be less."""
    return max(k & -k, 256)


@functools.cache
def grouped_tile(arch: int, itemsize: int, pairs: int, experts: int, gated: bool) -> GroupedTile:
    """The tile of a grouped product of so many pairs of a token and one of the experts."""
    mean = -(-pairs // experts)
    if itemsize == 4:
        return GroupedTile(16 if mean <= 12 else 32, 32, 32, 4, 2)
    tile = next((tile for (most, kind), tile in GROUPED.items() if mean <= most and kind == gated), GROUPED_MANY[gated])
    if arch >= HOPPER:
        return tile
    # An estimate, whose shared memory fits desktop GPUs too.
    return GroupedTile(min(tile.block_m, 64), 64 if not gated else 32, 64, 4, 3)
