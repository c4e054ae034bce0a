"""Which tile a launch gets: the tables are sparse, so a row that is added must not hide another one."""

from __future__ import annotations

import pytest

from hf_fastattn.kernels.attention import configs
from hf_fastattn.kernels.attention.configs import Tile, row_tile, shared_prefix_tile, split_kv_tile, tile_of

TABLES = {name: table for name, table in vars(configs).items() if name.isupper() and isinstance(table, dict)}


def test_an_entry_for_larger_heads_hides_no_entry_for_smaller_ones():
    table = {(80, 2, 128): Tile(1, 1, 1, 1), (80, 2, 256): Tile(2, 2, 2, 2), (90, 2, 256): Tile(3, 3, 3, 3)}
    assert tile_of(table, 90, 2, 128) is table[80, 2, 128]
    assert tile_of(table, 90, 2, 64) is table[80, 2, 128]
    assert tile_of(table, 90, 2, 256) is table[90, 2, 256]
    assert tile_of(table, 89, 2, 256) is table[80, 2, 256]
    assert tile_of(table, 90, 4, 64) is None


def test_the_only_entry_serves_smaller_heads():
    table = {(80, 4, 256): Tile(1, 1, 1, 1)}
    assert tile_of(table, 120, 4, 64) is table[80, 4, 256]


@pytest.mark.parametrize("name", TABLES)
def test_every_entry_is_found(name):
    for (arch, itemsize, limit), tile in TABLES[name].items():
        assert tile_of(TABLES[name], arch, itemsize, limit) is tile


# Rows of 8 kv heads on 132 multiprocessors -> keys a tile, programs a multiprocessor: the quickest of those tried, or within
# an eighth of it, for rows of one length; others cost up to half of the speed.
QUICKEST = {
    128: {1: (128, 1), 4: (128, 1), 6: (32, 3), 8: (128, 1), 12: (32, 3), 16: (128, 1), 24: (32, 3), 28: (64, 2),
          32: (64, 2), 40: (32, 3), 48: (32, 3), 56: (32, 4), 64: (32, 4), 72: (32, 3), 96: (32, 3), 128: (32, 4),
          144: (32, 3), 192: (32, 4), 256: (32, 4)},
    64: {2: (128, 3), 4: (128, 3), 8: (128, 3), 12: (128, 3), 16: (128, 3), 24: (128, 3), 32: (64, 2), 40: (128, 3),
         48: (128, 3), 64: (64, 4), 96: (128, 3), 128: (64, 4), 144: (128, 3), 256: (64, 4)},
}  # fmt: skip


@pytest.mark.parametrize("dim", QUICKEST)
def test_decode_on_hopper_takes_what_was_measured(dim):
    for rows, expected in QUICKEST[dim].items():
        tile = split_kv_tile(90, 2, dim, 4, rows * 8, 132)
        assert (tile.block_n, tile.programs) == expected, rows
    for pairs in (1, 64, 384, 512, None):
        assert split_kv_tile(90, 2, dim, 32, pairs, 132) == Tile(64, 64, 4, 5), "appends"
        assert split_kv_tile(80, 2, dim, 4, pairs, 108) == Tile(64, 64, 4, 5), "another architecture"


@pytest.mark.parametrize("dim", [64, 128])
def test_functions_of_a_variant_take_tiles_that_were_measured_with_them(dim):
    expected = {1: (128, 1), 16: (128, 1), 32: (64, 2), 48: (32, 3), 64: (32, 4), 256: (32, 4)}
    for rows, tile in expected.items():
        found = split_kv_tile(90, 2, dim, 4, rows * 8, 132, hooked=True)
        assert (found.block_n, found.programs) == tile, rows
    for rows, tile in {**expected, 64: (64, 2), 256: (32, 3)}.items():
        found = split_kv_tile(90, 2, dim, 4, rows * 8, 132, hooked=True, transformed=True)
        assert (found.block_n, found.programs) == tile, rows


def test_decode_over_eight_bits_on_hopper_takes_what_was_measured():
    """Rows of 8 kv heads; what is not known of their lengths may be long."""
    few, many = Tile(16, 128, 4, 5), Tile(64, 32, 1, 5, programs=8)
    for rows, keys, expected in (
        (8, None, few), (8, 8192, few), (16, 8192, many), (16, None, many), (16, 2048, few), (32, 1024, few),
        (32, 4096, many), (64, 512, many),
    ):  # fmt: skip
        assert split_kv_tile(90, 1, 128, 4, rows * 8, 132, keys=keys) == expected, (rows, keys)
        assert split_kv_tile(90, 2, 128, 4, rows * 8, 132, keys=keys) == split_kv_tile(90, 2, 128, 4, rows * 8, 132)
    assert split_kv_tile(90, 1, 128, 4, None, 132, keys=64) == many, "batch-invariant"
    assert row_tile(90, 1, 128, 4, 8, 132) == Tile(16, 64, 2, 5)
    assert row_tile(90, 2, 128, 4, 8, 132) == split_kv_tile(90, 2, 128, 4, 8, 132)


def test_shared_prefixes_on_hopper_take_what_was_measured():
    """Rows of one prompt and 8 kv heads of 4 query heads; 256 rows without grouped heads; the same with keys transformed."""
    usual, many, few = Tile(64, 64, 4, 5), Tile(128, 64, 8, 5, programs=1), Tile(64, 64, 4, 7, programs=1)
    for rows, tile in {16: few, 64: many, 256: usual}.items():
        assert shared_prefix_tile(90, 2, 128, min(rows, 64) * 4, rows * 8, 132) == tile, rows
    assert shared_prefix_tile(90, 2, 128, 256, 256 * 32, 132) == usual
    assert shared_prefix_tile(90, 2, 128, 256, 256 * 8, 132, transformed=True) == many
    assert shared_prefix_tile(90, 2, 128, 4 * 4, 64 * 8, 132) == split_kv_tile(90, 2, 128, 4, None, 132), "groups of 4"
    for pairs in (8, 64, 2048):
        assert shared_prefix_tile(90, 2, 64, 16, pairs, 132) == shared_prefix_tile(90, 2, 128, 16, pairs, 132), "heads of 64"
    for itemsize, dim in ((2, 256), (4, 128)):
        assert shared_prefix_tile(90, itemsize, dim, 256, 512, 132) == shared_prefix_tile(90, itemsize, dim, 64, 512, 132)
