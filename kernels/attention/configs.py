"""Block shapes, warps and pipeline stages of the attention kernels, as data.

Nothing is tuned at run time. The entries compile for their architecture with few or no spills; those for 16-bit types and
head dim 128 on Hopper were chosen by measurement, all others by the compiler's report only. An architecture without an
entry takes that of `DEFAULT`, whose shared memory fits every GPU from compute capability 8.0 on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_fastattn.kernels.launch import DEFAULT, power_of_2
from hf_fastattn.kernels.variants.hooks import CompiledVariant


@dataclass(frozen=True)
class Tile:
    """Launch configuration of one attention kernel.

    Attributes:
        block_m: packed query rows (tokens * R) a tile; the most of them in split-KV, which takes no more than there are.
        block_n: keys a tile.
        warps: warps a program.
        stages: pipeline stages of the K/V loop; the page lookup ahead of each load takes up every second stage.
        programs: programs that split-KV launches for each multiprocessor (SM).
        overlaps: they start before the launch ahead ends, and wait for it inside.
        on_matrix_unit: fp32 is multiplied there, in three TF32 products, however few rows the tile has.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int = 2
    overlaps: bool = False
    on_matrix_unit: bool = False


@dataclass(frozen=True)
class ShortRowTile:
    """Launch configuration of `short_row.py`.

    Attributes:
        block_n: keys a tile.
        warps: warps a program.
        programs: that are launched for each multiprocessor.
    """

    block_n: int
    warps: int
    programs: int = 1


# (architecture, bytes of an element, largest head dim rounded up to a power of two) -> tile; others were not measured.
SHORT_ROW: dict[tuple[int, int, int], ShortRowTile] = {
    (90, 2, 128): ShortRowTile(32, 1, programs=6),
}
# A row of up to so many keys is short, if it has no more query heads than these: each of them reads the keys by itself.
MOST_SHORT_KEYS = 1024
MOST_SHORT_HEADS = 32
# Several rows are short together if they are no more than these, and have no more keys times query heads. On an H200 append,
# attention and the products before and behind them take 25.6 us for 4 rows of 160 keys and 32 heads, where two launches take
# 36.5; 34.5 and 40.0 for 640 keys, 35.2 and 41.6 for 8 rows of 320, but 57.0 and 47.2 for 8 of 1,000. The limit is that of
# 8 rows of 512 keys and 128 new ones with 16 heads: 21.4 and 26.6.
MOST_SHORT_ROWS = 8
MOST_SHORT_READS = 84 * 1024

# (architecture, bytes of an element, largest head dim rounded up to a power of two) -> tile. One byte: keys and values of 8
# bits with queries of 16; with queries in fp32, the tiles of four bytes serve.
PREFILL: dict[tuple[int, int, int], Tile] = {
    (80, 2, 128): Tile(128, 32, 8, 3),
    (80, 2, 256): Tile(64, 32, 8, 2),
    (80, 4, 256): Tile(16, 16, 8, 2),
    (80, 1, 128): Tile(128, 32, 8, 3),
    (80, 1, 256): Tile(64, 32, 8, 3),
    (90, 2, 128): Tile(128, 64, 8, 5),
    (90, 4, 128): Tile(128, 32, 8, 2),
    (90, 2, 256): Tile(128, 32, 8, 3),
    (100, 2, 128): Tile(128, 64, 8, 3),
}
# For launches of at most 64 packed query rows a kv head.
PREFILL_SHORT: dict[tuple[int, int, int], Tile] = {
    (80, 2, 128): Tile(64, 32, 4, 3),
    (90, 2, 128): Tile(64, 64, 4, 3),
    (100, 2, 128): Tile(64, 64, 4, 3),
}
SPLIT_KV: dict[tuple[int, int, int], Tile] = {
    (80, 1, 128): Tile(64, 128, 4, 5),
    (80, 1, 256): Tile(64, 64, 8, 3),
    # Programs of one warp: no warp waits for another between two tiles, which takes most of the time of four.
    (90, 1, 128): Tile(64, 32, 1, 5, programs=8),
    (80, 2, 128): Tile(64, 64, 4, 5),
    # Four warps would spill.
    (80, 2, 256): Tile(64, 32, 8, 3),
    (80, 4, 256): Tile(16, 16, 8, 2),
    (90, 2, 256): Tile(64, 32, 4, 3),
    (100, 2, 256): Tile(64, 32, 4, 3),
}
# Decode in fp32 as three TF32 products, of 16 query rows too: on an H200 23, 27 and 106 us for 1, 8 and 64 rows of 544 keys
# (8 kv heads of 128), where the CUDA cores took 37, 70 and 418.
SPLIT_KV_TF32: dict[tuple[int, int, int], Tile] = {
    (90, 4, 128): Tile(16, 32, 4, 2, on_matrix_unit=True),
}
# For more than 16 packed query rows. Complete for 16-bit types: an entry for larger heads would serve smaller ones too.
# 64 query rows of head dim 256 need more registers than four warps have.
SPLIT_KV_APPEND: dict[tuple[int, int, int], Tile] = {
    # More rows at once would take values byte by byte: see `eight_bit_tiles.py`.
    (80, 1, 128): Tile(16, 128, 4, 5),
    (80, 1, 256): Tile(16, 64, 8, 3),
    # Dequantised for 32 rows at once.
    (90, 1, 128): Tile(32, 64, 2, 5, programs=4),
    (80, 2, 128): Tile(64, 64, 4, 5),
    (80, 2, 256): Tile(64, 32, 8, 3),
    (90, 4, 128): Tile(64, 32, 4, 2),
    (100, 2, 128): Tile(64, 32, 4, 6),
}
# One program per SM, with dependent launch; of 8 bits two, for heads of 64 three. Used if rows * kv_heads <= SMs and either
# occupancy is no lower than with the default tile, or there are FEW_PAIRS SMs for each (row, kv head) pair.
FEW_PAIRS = 4
# Programs of one warp are slower where each reads so few tiles that it should be quick: measured at 64 pairs, not at 128,
# and of up to so many keys a row at 128 and 256 pairs.
FEW_PAIRS_OF_8_BITS, FEW_KEYS_OF_8_BITS = 2, 2048
SPLIT_KV_FEW: dict[tuple[int, int, int], Tile] = {
    (90, 1, 128): Tile(16, 128, 4, 5),
    (90, 2, 64): Tile(16, 128, 2, 5, programs=3),
    (90, 2, 128): Tile(16, 128, 4, 5, programs=1, overlaps=True),
    (100, 2, 128): Tile(16, 128, 4, 5, programs=1, overlaps=True),
}
# For the rows of one new token that `decode_row.py` takes; by default the tile of few pairs.
SPLIT_KV_ROW: dict[tuple[int, int, int], Tile] = {
    (90, 1, 128): Tile(16, 64, 2, 5),
}
# Three programs per SM, for numbers of pairs that fill them better than two, and for many pairs.
SPLIT_KV_FITTING: dict[tuple[int, int, int], Tile] = {
    (90, 2, 64): Tile(64, 128, 2, 5, programs=3),
    (90, 2, 128): Tile(64, 32, 4, 6, programs=3),
}
# Four programs of two warps per SM, for pairs of which each takes one to four whole: on an H200 64 rows of 560, 1,024 and
# 2,048 keys (8 kv heads of 128) take 42.0, 69.1 and 130.2 us, where two programs of four warps took 48.2, 74.4 and 134.4.
SPLIT_KV_WHOLE: dict[tuple[int, int, int], Tile] = {
    (90, 2, 64): Tile(64, 64, 2, 6, programs=4),
    (90, 2, 128): Tile(64, 32, 2, 6, programs=4),
}
# Share of the programs that a stream-K split keeps busy.
LIST_FILL = 0.8
# Bytes that a variant's functions may read for a tile of scores without a loop of fewer stages.
FEW_BYTES = 8192
# For prefixes with more than 16 packed query rows. 64 rows of head dim 256 need more registers than four warps have.
SHARED_PREFIX: dict[tuple[int, int, int], Tile] = {
    (80, 1, 128): Tile(16, 128, 4, 5),
    (80, 1, 256): Tile(16, 64, 8, 3, programs=1),
    (80, 2, 128): Tile(64, 64, 4, 5),
    (80, 2, 256): Tile(64, 32, 8, 2, programs=1),
    (80, 4, 256): Tile(16, 16, 8, 2),
}
# For at least MANY_QUERIES of them, if there are not many (row, kv head) pairs, or keys are transformed, which is done again
# for each block of queries.
SHARED_PREFIX_MANY: dict[tuple[int, int, int], Tile] = {
    (80, 1, 128): Tile(64, 64, 8, 5, programs=1),
    (90, 2, 128): Tile(128, 64, 8, 5, programs=1),
}
MANY_QUERIES = 256
# Above this many pairs per multiprocessor long prefixes are bound by matrix products, not by reading keys.
MANY_PAIRS = 8
# For few rows, where latency counts, and more than 16 packed query rows.
SHARED_PREFIX_FEW: dict[tuple[int, int, int], Tile] = {
    (90, 2, 128): Tile(64, 64, 4, 7, programs=1),
}
# For the suffixes of rows that share prefixes, a part of one (row, kv head) each; so many programs are launched for each
# multiprocessor, most of which have nothing to do where suffixes are short.
SUFFIX: dict[tuple[int, int, int], Tile] = {
    (80, 1, 128): Tile(16, 64, 4, 3, programs=8),
    (80, 1, 256): Tile(16, 32, 4, 3, programs=8),
    (80, 2, 128): Tile(16, 64, 4, 3, programs=8),
    (80, 2, 256): Tile(16, 32, 4, 3, programs=8),
    (80, 4, 256): Tile(16, 16, 8, 2, programs=8),
}
# For more (row, kv head) pairs than multiprocessors: small programs, of which many run at once.
SUFFIX_MANY: dict[tuple[int, int, int], Tile] = {
    (90, 2, 128): Tile(16, 32, 2, 4, programs=8),
}
MOST_PARTS = 32


def element_bytes(q: Tensor, k_pages: Tensor) -> int:
    """Bytes of an element, as the tables count them."""
    return k_pages.element_size() if q.element_size() == 2 else q.element_size()


def tile_of(table: dict[tuple[int, int, int], Tile], arch: int, itemsize: int, block_d: int) -> Tile | None:
    """The entry of the smallest head dim that holds `block_d`, of the architecture or else of `DEFAULT`; else None."""
    for limit in (64, 128, 256):
        for row in (arch, DEFAULT):
            if block_d <= limit and (row, itemsize, limit) in table:
                return table[row, itemsize, limit]
    return None


def short_heads(rows: int, keys: int) -> int:
    """How many query heads a step's rows may have for `short_row.py` to be quicker than an append and split-KV.

    Args:
        keys: the most that a row has.

    Returns:
        A power of two up to `MOST_SHORT_HEADS`; 0 if rows are too many or too long.
    """
    if rows > MOST_SHORT_ROWS or keys > MOST_SHORT_KEYS:
        return 0
    fitting = MOST_SHORT_HEADS if rows == 1 else min(MOST_SHORT_READS // (rows * keys), MOST_SHORT_HEADS)
    return 1 << fitting.bit_length() - 1 if fitting else 0


def short_row_tile(arch: int, itemsize: int, block_d: int, heads: int) -> ShortRowTile | None:
    """The tile of `short_row.py` for so many query heads a row; None where it is not known to be quicker."""
    if heads > MOST_SHORT_HEADS or block_d > 128:
        return None
    return SHORT_ROW.get((arch, itemsize, 128))


def stages_with(variant: CompiledVariant, stages: int, block_m: int, block_n: int, *, masked: bool = True) -> int:
    """Pipeline stages of a loop over keys in which a variant's functions read tensors of their own.

    Triton buffers these loads in shared memory as it does keys and values: with 3 stages once, with 1 not at all.

    Args:
        block_m: packed query rows of a tile.
        block_n: keys of a tile.
        masked: the loop calls the variant's mask.
    """
    reading = [hook for hook in variant.reading if hook in ("score_mod", "key_transform") or (masked and hook == "mask_mod")]
    if variant.tensors is None or not reading:
        return stages
    if "key_transform" not in reading and len(variant.tensors) * block_m * block_n * 4 <= FEW_BYTES:
        return stages
    return 1 if "key_transform" in reading or len(variant.tensors) > 2 else min(stages, 3)


def prefill_tile(arch: int, itemsize: int, block_d: int, queries: int | None) -> Tile:
    """The tile of a prefill of `queries` packed query rows a kv head.

    With `queries` None it depends on architecture, dtype and head dim only.
    """
    short = tile_of(PREFILL_SHORT, arch, itemsize, block_d) if queries is not None and queries <= 64 else None
    found = short or tile_of(PREFILL, arch, itemsize, block_d)
    assert found is not None
    return found


def split_kv_tile(
    arch: int, itemsize: int, block_d: int, queries: int, pairs: int | None, processors: int, rotated: bool = False,
    hooked: bool = False, keys: int | None = None, transformed: bool = False,
) -> Tile:  # fmt: skip
    """The tile of a decode or short append of `queries` packed query rows a (row, kv head) pair.

    With `pairs` None it depends on architecture, dtype and head dim only. `rotated`: the kernel rotates keys; their angles
    take registers, so that no more than two programs fit on a multiprocessor. `hooked`: it calls a variant's functions, with
    which the entries for heads of 64 were not measured; `transformed`: one of them transforms keys, for which two warps have
    too few registers. `keys`: the most of a row, if known.
    """
    found = tile_of(SPLIT_KV_TF32, arch, itemsize, block_d) or tile_of(SPLIT_KV, arch, itemsize, block_d)
    assert found is not None
    if pairs is None:
        return found
    if queries > 16:
        return tile_of(SPLIT_KV_APPEND, arch, itemsize, block_d) or found
    if rotated:
        return found
    limit = max(block_d, 128) if hooked else block_d
    few, fitting, whole = (
        tile_of(table, arch, itemsize, limit) for table in (SPLIT_KV_FEW, SPLIT_KV_FITTING, SPLIT_KV_WHOLE)
    )
    if fitting and whole and not transformed and pairs > found.programs * processors:
        if _fill(whole, pairs, processors) > max(_fill(fitting, pairs, processors), LIST_FILL):
            return whole
    many = pairs > 2 * found.programs * processors
    if fitting and (many or _fill(fitting, pairs, processors) > max(_fill(found, pairs, processors), LIST_FILL)):
        found = fitting
    if few and itemsize == 1:
        short = keys is not None and keys <= FEW_KEYS_OF_8_BITS and pairs <= few.programs * processors
        found = few if short or pairs * FEW_PAIRS_OF_8_BITS <= processors else found
    elif few and pairs <= processors:
        as_full = _fill(few, pairs, processors) >= _fill(found, pairs, processors)
        found = few if as_full or pairs * FEW_PAIRS <= processors else found
    return found


def row_tile(arch: int, itemsize: int, block_d: int, queries: int, pairs: int, processors: int) -> Tile:
    """The tile of `decode_row.py`: see `split_kv_tile`, whose entries for heads of 64 were measured with several rows."""
    found = tile_of(SPLIT_KV_ROW, arch, itemsize, block_d)
    return found or split_kv_tile(arch, itemsize, max(block_d, 128), queries, pairs, processors)


def _fill(tile: Tile, pairs: int, processors: int) -> float:
    """Occupancy: the busy share of the programs.

    Each takes an equal part of one pair, or as many whole pairs as the others, up to `programs`; or a part of the list.
    """
    programs = tile.programs * processors
    if pairs <= programs:
        return programs // pairs * pairs / programs
    items = -(-pairs // programs)
    return pairs / (items * programs) if items <= tile.programs else LIST_FILL


def shared_prefix_tile(
    arch: int, itemsize: int, block_d: int, queries: int, pairs: int, processors: int, transformed: bool = False
) -> Tile:
    """The tile of a decode of rows that share prefixes, of `queries` packed query rows a (prefix group, kv head) pair.

    Args:
        pairs: (row, kv head) pairs; if no more than multiprocessors, latency counts.
        processors: multiprocessors.
        transformed: a variant transforms keys.
    """
    few, usual = (SHARED_PREFIX_FEW, SHARED_PREFIX) if queries > 16 else (SPLIT_KV_FEW, SPLIT_KV)
    tables = [usual]
    if pairs <= processors:
        tables = [few, usual]
    elif queries >= MANY_QUERIES and (transformed or pairs <= MANY_PAIRS * processors):
        tables = [SHARED_PREFIX_MANY, usual]
    # Entries for heads of 64 were measured without shared prefixes.
    limit = max(block_d, 128)
    return next(tile for table in tables if (tile := tile_of(table, arch, itemsize, limit)) is not None)


def suffix_tile(arch: int, itemsize: int, block_d: int, pairs: int, processors: int, transformed: bool = False) -> Tile:
    """The tile of the suffixes of rows that share prefixes, of `pairs` (row, kv head) pairs.

    `transformed`: a variant transforms keys, for which two warps have too few registers.
    """
    many = tile_of(SUFFIX_MANY, arch, itemsize, block_d) if pairs > processors and not transformed else None
    found = many or tile_of(SUFFIX, arch, itemsize, block_d)
    assert found is not None
    return found


def parts_of_suffixes(tile: Tile, pairs: int, processors: int) -> int:
    """Programs of each of `pairs` (row, kv head) pairs: at least two, so that one long suffix among short ones is shared."""
    return min(max(power_of_2(tile.programs * processors // pairs + 1) // 2, 2), MOST_PARTS)
