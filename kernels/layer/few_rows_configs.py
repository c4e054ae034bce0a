"""Tiles of `few_rows.py`, as data, and where its launches are quicker than those of `skinny.py`.

Measured on an H200 in chains of the launches of whole layers: Qwen3-0.6B and 4B, Llama-3.2-1B and Llama-3-8B, with 4 and 16
rows of 600 keys, and each product by itself. The rules generalise the best of them. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from hf_fastattn.kernels.layer.configs import FEW_TOKENS, HOPPER


@dataclass(frozen=True)
class FewRowsTile:
    """Launch configuration of one product of `few_rows.py`.

    Attributes:
        warps: warps a program, which share the columns.
        loads: loads of 32 columns a warp makes for each of 16 rows of a weight (of each of gate and up) at a time.
        held: how often it does so ahead of the product.
    """

    warps: int
    loads: int
    held: int


# (gated, normalised, more than 8 tokens) -> tile of `few_rows.py`; gate and up of more than 8 tokens are normalised apart,
# where they are not small.
FEW_ROWS: dict[tuple[bool, bool, bool], FewRowsTile] = {
    (False, True, False): FewRowsTile(4, 2, 4),
    (False, True, True): FewRowsTile(4, 2, 4),
    (False, False, False): FewRowsTile(8, 2, 4),
    (False, False, True): FewRowsTile(8, 4, 2),
    (True, True, False): FewRowsTile(4, 2, 4),
    (True, True, True): FewRowsTile(2, 2, 4),
    (True, False, False): FewRowsTile(4, 2, 4),
    (True, False, True): FewRowsTile(4, 2, 3),
}
# (K, rows of all weights of the launch, gated, normalised, more than 8 tokens) -> tile, where it is another.
FEW_ROWS_MEASURED: dict[tuple[int, int, bool, bool, bool], FewRowsTile] = {
    (4096, 6144, False, True, False): FewRowsTile(4, 4, 3),
    (9728, 2560, False, False, False): FewRowsTile(4, 4, 3),
    (8192, 3072, False, False, False): FewRowsTile(4, 4, 3),
    (4096, 4096, False, False, False): FewRowsTile(4, 4, 2),
    (2048, 16384, True, True, False): FewRowsTile(2, 2, 4),
    (4096, 28672, True, True, False): FewRowsTile(2, 2, 4),
    (1024, 6144, True, True, True): FewRowsTile(4, 2, 4),
    (2560, 19456, True, False, False): FewRowsTile(4, 2, 3),
}
# Tokens for which a lane holds four sums of two rows. Above, programs read as much of x as of 16 rows of a weight, and those
# that normalise it compute too much for large weights.
HALF_TOKENS = 8
SMALL_GATED = 2048 * 16384
# Rows and columns of a weight up to which more than 8 tokens are taken: with 4,096 layers were slower than by `skinny.py`.
MANY_ROWS_AND_COLUMNS = 3072
# Bytes of x that stay in the L1 cache.
MOST_X = 128 * 1024
# Columns of a weight: the fewest (of 1,024 on they were measured) and the most for which all rounds of a program are written
# out (14,336 were measured); and the most of output layers that are quicker so.
FEWEST_COLUMNS, MOST_COLUMNS, MOST_OUTPUT_COLUMNS = 512, 16384, 2048
# An output layer has at least so many rows.
OUTPUT_ROWS = 65536


@functools.cache
def few_rows_tile(
    arch: int, itemsize: int, tokens: int, k: int, rows: int, gated: bool, normalised: bool
) -> FewRowsTile | None:
    """The tile of `few_rows.py` for `tokens` rows of x times `rows` weight rows of `k` columns; None if not quicker.

    Args:
        rows: of all weights; gate and up count as `2 * I` rows.
        normalised: x is normalised by the same launch, in place of one ahead of it.
    """
    if arch != HOPPER or itemsize != 2 or not 1 < tokens <= FEW_TOKENS or 2 * tokens * k > MOST_X:
        return None
    if not FEWEST_COLUMNS <= k <= MOST_COLUMNS:
        return None
    many = tokens > HALF_TOKENS
    if rows >= OUTPUT_ROWS:
        return (FewRowsTile(4, 4, 3) if many else FewRowsTile(2, 4, 4)) if k <= MOST_OUTPUT_COLUMNS else None
    if many and min(k, rows) > MANY_ROWS_AND_COLUMNS:
        return None
    if many and gated and normalised and k * rows > SMALL_GATED:
        return None
    tile = FEW_ROWS_MEASURED.get((k, rows, gated, normalised, many)) or FEW_ROWS[gated, normalised, many]
    # A step of four loads takes 128 columns.
    return tile if k % (32 * tile.loads) == 0 else replace(tile, loads=2, held=2 * tile.held)
