"""Tiles of the matrix-vector and skinny products, as data, and where cuBLAS is as quick.

All were measured on an H200, with weights of Llama-3-8B's shapes (in fp32 those of a 0.6B model too), read from memory (not
from the L2 cache). The rules generalise the best of them: one token needs full vector loads of long rows; more tokens need
exactly as many programs as the GPU runs at once. `MEASURED` holds the exceptions to the rules. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ProductTile:
    """Launch configuration of one product.

    Attributes:
        block_n: weight rows a program (of each of gate and up).
        block_k: columns a step.
        warps: warps a program.
        stages: pipeline stages of the loads of weight tiles.
        split: split-K, the programs that share a tile of weight rows, each with a part of the columns; 1 for one token.
        vector: neighbouring columns that a thread adds up at once; 1 for several tokens.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    split: int = 1
    vector: int = 1


@dataclass(frozen=True)
class RowTile:
    """Launch configuration of one product of `one_wave.py`.

    Attributes:
        rows: weight rows a warp (of each of gate and up).
        warps: warps a program.
        l1: quicker if it asks for L1 cache where attention beside it takes shared memory.
    """

    rows: int
    warps: int
    l1: bool = False


# Token counts are rounded up to a bucket, and share its entry.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
MOST_TOKENS = BUCKETS[-1]

HOPPER = 90
# (architecture, bucket of tokens, K, rows of all weights of the launch) -> tile, for 16-bit weights
MEASURED: dict[tuple[int, int, int, int], ProductTile] = {
    **{(HOPPER, bucket, 4096, 4096): ProductTile(64, 256, 4, 3, split=2) for bucket in (2, 4, 8, 16)},
    (HOPPER, 64, 4096, 6144): ProductTile(64, 64, 4, 6, split=2),
    # Gate and up of a small model: adding up the parts of both would take longer than reading their weights.
    (HOPPER, 64, 1024, 6144): ProductTile(64, 64, 4, 6),
    (HOPPER, 1, 8192, 2048): ProductTile(2, 2048, 4, 2, vector=8),
    # Columns of `down_proj` on each of several ranks: steps of 2048 would leave half of the last one empty.
    (HOPPER, 1, 7168, 4096): ProductTile(4, 4096, 8, 2, vector=8),
    (HOPPER, 1, 7168, 8192): ProductTile(4, 4096, 8, 2, vector=8),
    (HOPPER, 1, 14336, 8192): ProductTile(4, 1024, 4, 2),
}

# (architecture, K, rows of all weights of the launch, gated) -> tile of `one_wave.py`, 16-bit weights: where it was found
# to be quicker than `matvec.py` in the chain of a model's launches, the norm before it counted in.
ONE_WAVE: dict[tuple[int, int, int, bool], RowTile] = {
    # Qwen3-0.6B: q, k and v; o; gate and up; down.
    (HOPPER, 1024, 4096, False): RowTile(4, 4, l1=True),
    (HOPPER, 2048, 1024, False): RowTile(1, 1, l1=True),
    (HOPPER, 1024, 6144, True): RowTile(2, 8, l1=True),
    (HOPPER, 3072, 1024, False): RowTile(1, 4, l1=True),
    # Llama-3.2-1B, all but down; o is also that of Qwen3-1.7B.
    (HOPPER, 2048, 3072, False): RowTile(4, 4),
    (HOPPER, 2048, 2048, False): RowTile(1, 8),
    (HOPPER, 2048, 16384, True): RowTile(1, 8),
    # Qwen3-1.7B.
    (HOPPER, 2048, 4096, False): RowTile(2, 4),
    (HOPPER, 2048, 12288, True): RowTile(1, 4),
    # Qwen2.5-0.5B.
    (HOPPER, 896, 1152, False): RowTile(2, 4),
    (HOPPER, 896, 896, False): RowTile(1, 2),
    (HOPPER, 896, 9728, True): RowTile(1, 4),
    # Qwen2.5-1.5B.
    (HOPPER, 1536, 2048, False): RowTile(1, 4),
    (HOPPER, 1536, 1536, False): RowTile(1, 2),
    (HOPPER, 1536, 17920, True): RowTile(1, 4),
    # Llama-3.2-3B, whose other products are as quick in `matvec.py`.
    (HOPPER, 3072, 5120, False): RowTile(2, 4),
}

# (largest bucket, gated) -> (tile without its split, programs of it that an SM of Hopper holds), in order of preference
SKINNY: dict[tuple[int, bool], tuple[tuple[ProductTile, int], ...]] = {
    (16, False): ((ProductTile(64, 128, 4, 4), 2), (ProductTile(32, 256, 4, 3), 3)),
    (32, False): ((ProductTile(64, 128, 4, 4), 2),),
    (64, False): ((ProductTile(64, 128, 4, 4), 1), (ProductTile(64, 64, 4, 6), 2)),
    # A shorter pipeline leaves shared memory to the programs of the next launch.
    (32, True): ((ProductTile(64, 128, 4, 2), 2),),
    (64, True): ((ProductTile(64, 64, 4, 3), 2),),
}
# The same for fp32 weights and x, each product three in TF32: a thread holds both parts of what it multiplies.
SKINNY_FP32: dict[tuple[int, bool], tuple[tuple[ProductTile, int], ...]] = {
    (64, False): ((ProductTile(64, 64, 4, 3), 2),),
    (16, True): ((ProductTile(64, 64, 4, 3), 2),),
    (64, True): ((ProductTile(64, 32, 4, 4), 2),),
}
# Multiprocessors (SMs) of an H100 or H200.
PROCESSORS = 132
MOST_SPLITS = 8
# Fewest steps of a split-K part: shorter ones would be mostly prologue and epilogue.
FEWEST_STEPS = 4
# From this many weight rows on, programs of four rows each are enough to fill every SM (one token).
MANY_ROWS = 6144
# Above this many columns a row takes many steps, and programs of fewer warps are quicker.
LONG_ROWS = 8192
# Above this many tokens cuBLAS is as quick for some shapes in 16 bits (in fp32 it is not, computing on the CUDA cores);
# other GPUs were not measured there.
FEW_TOKENS = 16
# Elements of a weight up to which cuBLAS is quicker for more tokens: of models of 1,024 hidden dimensions.
SMALL_WEIGHT = 4 * 1024 * 1024


def bucket_of(tokens: int) -> int:
    """The smallest bucket that holds `tokens`."""
    return next(bucket for bucket in BUCKETS if tokens <= bucket)


@functools.cache
def beats_cublas(arch: int, itemsize: int, tokens: int, k: int, rows: int, weights: int, adapted: bool = False) -> bool:
    """Whether one launch for all weights is quicker than a call of cuBLAS for each.

    Args:
        rows: of all `weights` together.
        adapted: a weight has a LoRA adapter, which costs a launch of ours little, but calls several launches each.
    """
    if tokens <= FEW_TOKENS:
        return True
    if tokens > MOST_TOKENS or arch != HOPPER:
        return False
    if itemsize == 4:
        return True
    # A single weight only if it has far more columns than rows, where cuBLAS's split-K is worse, and is not small.
    return adapted or weights > 1 or (k >= 2 * rows and k * rows > SMALL_WEIGHT)


@functools.cache
def product_tile(
    arch: int, itemsize: int, tokens: int, k: int, rows: int, gated: bool, rounds: bool = False, adapted: bool = False
) -> ProductTile:
    """The tile for `tokens` rows of x times `rows` weight rows of `k` columns; gate and up count as `2 * I` rows.

    Args:
        itemsize: bytes of an element of x.
        rounds: the weights are fp32 and x is not: a step takes as many bytes of them, and so half the columns.
        adapted: a weight has a LoRA adapter. Every program reads its sums, so that for one token fewer programs are
            quicker (H200: 4 rows and 4 warps take 4 to 6 us less for gate and up of 8,192 rows than 2 rows and 8 warps).
    """
    if adapted and tokens == 1 and itemsize == 2:
        tile = product_tile(arch, itemsize, tokens, k, rows, gated, rounds)
        return replace(tile, block_n=4, warps=4, vector=8)
    if rounds and itemsize == 2:
        tile = product_tile(arch, itemsize, tokens, k, rows, gated)
        return replace(tile, block_k=tile.block_k // 2)
    bucket = bucket_of(tokens)
    # Later architectures are closer to Hopper than to the estimate for Ampere.
    found = MEASURED.get((min(arch, HOPPER), bucket, k, rows)) if itemsize == 2 else None
    if found is not None:
        return found
    if bucket == 1:
        return _vector_tile(itemsize, k, rows, gated)
    if arch >= HOPPER:
        return _skinny_tile(bucket, k, rows, gated, SKINNY if itemsize == 2 else SKINNY_FP32)
    tile = _ampere_tile(bucket, k, rows, gated)
    return replace(tile, block_k=tile.block_k // 2) if itemsize == 4 else tile


def one_wave_tile(arch: int, itemsize: int, k: int, rows: int, gated: bool) -> RowTile | None:
    """The tile of `one_wave.py` for one token times `rows` weight rows of `k` columns; None where `matvec.py` is quicker.

    Args:
        rows: of all weights; gate and up count as `2 * I` rows.
    """
    return ONE_WAVE.get((arch, k, rows, gated)) if itemsize == 2 else None


def room_beside(arch: int, tokens: int, tile: ProductTile, counts: Sequence[int]) -> int:
    """Programs that a GPU runs at once beside those of a product of few tokens; 0 where that was not measured.

    Args:
        counts: rows of each weight, those of gate alone for gate and up.
    """
    if arch != HOPPER or not 1 < tokens <= FEW_TOKENS:
        return 0
    return max(2 * PROCESSORS - tile.split * sum(-(-count // tile.block_n) for count in counts), 0)


def _vector_tile(itemsize: int, k: int, rows: int, gated: bool) -> ProductTile:
    # Adding up neighbouring columns at once leaves registers for two rows of both weights.
    at_once = gated and itemsize == 2
    block_k = next((block for block in (4096, 2048, 1024)[not gated or at_once :] if _wastes_little(k, block)), 512)
    vector = 1
    if block_k < 2048:
        block_n, warps, stages = (2 if gated else 4), 4, 4
    elif gated:
        block_n, warps, stages, vector = (2, 8, 2, 8) if at_once else (1, 8, 2, 1)
    elif rows < MANY_ROWS:
        block_n, warps, stages = (4, 4, 2) if k > LONG_ROWS else (2, 8, 2)
    else:
        block_n, warps, stages = 4, 8, 2
    return ProductTile(block_n, block_k * 2 // itemsize, warps, stages, vector=vector)


def _wastes_little(k: int, block: int) -> bool:
    """Whether at most an eighth of the columns of all steps of a row are padding."""
    return 8 * k >= 7 * block * -(-k // block)


def _skinny_tile(
    bucket: int, k: int, rows: int, gated: bool, table: dict[tuple[int, bool], tuple[tuple[ProductTile, int], ...]]
) -> ProductTile:
    candidates = next(held for (most, kind), held in table.items() if bucket <= most and kind == gated)
    best, best_fill = candidates[0][0], 0.0
    for tile, programs in candidates:
        tiles = -(-rows // (tile.block_n * (2 if gated else 1)))
        slots = programs * PROCESSORS
        split = max(min(slots // tiles, k // (FEWEST_STEPS * tile.block_k), MOST_SPLITS), 1)
        # Occupancy over all waves, if all programs take equally long.
        fill = tiles * split / (-(-tiles * split // slots) * slots)
        if fill > best_fill:
            best, best_fill = ProductTile(tile.block_n, tile.block_k, tile.warps, tile.stages, split), fill
    return best


def _ampere_tile(bucket: int, k: int, rows: int, gated: bool) -> ProductTile:
    """An estimate, not measured, whose shared memory fits desktop GPUs too."""
    block_n = (64 if rows >= 64 * PROCESSORS else 32) // (2 if gated else 1)
    block_k = 128 if bucket <= FEW_TOKENS else 64
    programs = rows // (block_n * (2 if gated else 1))
    split = max(min(PROCESSORS // max(programs, 1), k // (FEWEST_STEPS * block_k), MOST_SPLITS), 1)
    return ProductTile(block_n, block_k, warps=4, stages=3, split=split)
