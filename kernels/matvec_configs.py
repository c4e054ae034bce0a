"""Tiles of the matrix-vector and skinny products, as data.

`MEASURED` is for tiles found by measurement, by shape, and has none yet. The default is an estimate: it aims at 30 to 64
KB in flight a multiprocessor, which is what reading at full speed should need on Hopper. Nothing is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProductTile:
    """Launch configuration of one product.

    Attributes:
        block_n: weight rows a program (of each of gate and up).
        block_k: columns a step.
        warps: warps a program.
        stages: of the pipeline of weight tiles.
        split: programs that share a tile of weight rows, each with a part of the columns; 1 for one token.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1


# Token counts up to the bucket share an entry.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MOST_TOKENS = BUCKETS[-1]

# (architecture, bucket of tokens, K, rows of all weights of the launch) -> tile, for 16-bit weights
MEASURED: dict[tuple[int, int, int, int], ProductTile] = {}

# Programs that occupy every multiprocessor of the largest GPUs.
FILLING = 128


def bucket_of(tokens: int) -> int:
    """The smallest bucket that holds `tokens`."""
    return next(bucket for bucket in BUCKETS if tokens <= bucket)


def product_tile(arch: int, itemsize: int, tokens: int, k: int, rows: int, gated: bool) -> ProductTile:
    """The tile for `tokens` rows of x against `rows` weight rows of `k` columns, gate and up counted both."""
    bucket = bucket_of(tokens)
    found = MEASURED.get((arch, bucket, k, rows)) if itemsize == 2 else None
    if found is not None:
        return found
    if bucket == 1:
        return _vector_tile(itemsize, k, rows, gated)
    return _skinny_tile(arch, itemsize, bucket, k, rows, gated)


def _vector_tile(itemsize: int, k: int, rows: int, gated: bool) -> ProductTile:
    # A tile that does not divide K wastes lanes in its last step.
    block_k = next((block for block in (2048, 1024, 512) if k % block == 0), 1024 if k > 512 else 512)
    block_n = 4 if rows >= 4 * 8 * FILLING else 2
    if gated:
        block_n //= 2
    if itemsize == 4:
        block_k //= 2
    return ProductTile(block_n, block_k, warps=8 if block_n * block_k >= 8192 else 4, stages=2)


def _skinny_tile(arch: int, itemsize: int, bucket: int, k: int, rows: int, gated: bool) -> ProductTile:
    if itemsize == 4:
        return ProductTile(16 if gated else 32, 32, warps=4, stages=2)
    block_n = 64 if rows >= 64 * FILLING else 32
    if gated:
        block_n //= 2
    if arch < 90:
        # Fits the shared memory of desktop GPUs too.
        block_k, stages = (128, 3) if bucket <= 16 else (64, 3)
    else:
        block_k, stages = (256 if bucket <= 16 and block_n <= 32 else 128), 4
    programs = rows // (block_n * (2 if gated else 1))
    # Parts of fewer than four steps would be all start and end.
    split = max(min(FILLING // max(programs, 1), k // (4 * block_k), 8), 1)
    return ProductTile(block_n, block_k, warps=4, stages=stages, split=split)
