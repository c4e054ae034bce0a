"""Tiles of the products with quantised weights, as data, measured on an H200 with weights of Llama-3-8B's shapes."""

from __future__ import annotations

from dataclasses import dataclass


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


def matrix_tile(k: int) -> dict[str, int]:
    """Warps of a program that takes 16 rows of `k` columns, 4 bits each, which its warps share."""
    warps = 8 if k >= 2048 else 4
    return {"WARPS": warps, "DEPTH": 1, "num_warps": warps}


def ints_tile(k: int, gated: bool) -> RowTile:
    """For `k` columns of 8 bits."""
    held = 2048 if k % 2048 == 0 or k >= 8192 else 1024 if k >= 1024 else 512
    return RowTile(2 if gated else 4, held, 4 if held > 512 else 2, 2)
