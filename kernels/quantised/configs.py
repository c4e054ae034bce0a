"""Tiles of the products with quantised weights, as data, measured on an H200 with weights of Llama-3-8B's shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RowTile:
    """Launch configuration of a product of one token.

    Attributes:
        rows: of each weight a program.
        columns: a step; of 4-bit codes words of eight.
        warps: a program.
        stages: of the pipeline of loads.
    """

    rows: int
    columns: int
    warps: int
    stages: int


def codes_tile(k: int, gated: bool) -> RowTile:
    """For `k` columns in 4-bit codes: `columns` are words of eight."""
    held = 512 if k % 4096 == 0 or k >= 8192 else 256 if k >= 1024 else 128
    return RowTile(2 if gated else 4, held, 4 if held > 128 else 2, 1)


def codes_matrix_tile(k: int, gated: bool, sums: int) -> dict[str, Any]:
    """For 16 rows of `k` columns in 4-bit codes, which the warps of a program share.

    Args:
        sums: that a lane keeps, 2 of one token to 8 of 16.
    """
    warps = 4 if gated or k < 2048 else 8
    # Codes are loaded before those at hand are multiplied, where registers for both leave programs enough.
    return {"WARPS": warps, "AHEAD": not gated and sums < 8, "num_warps": warps}


def tiles_matrix_tile(k: int, gated: bool) -> dict[str, Any]:
    """For 16 rows of `k` columns in tinygemm's tiles; DEPTH is how many parts ahead a warp loads."""
    warps = 4 if gated or k < 2048 else 16 if k >= 8192 and k % 2048 == 0 else 8
    return {"WARPS": warps, "DEPTH": 1 if warps == 16 else 2, "num_warps": warps}


def ints_tile(k: int, gated: bool) -> RowTile:
    """For `k` columns of 8 bits."""
    held = 2048 if k % 2048 == 0 or k >= 8192 else 1024 if k >= 1024 else 512
    if held == 2048 and not gated:
        return RowTile(8, held, 8, 2)
    return RowTile(2 if gated else 4, held, 4 if held > 512 else 2, 2)
