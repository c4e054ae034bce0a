"""Which tile a launch gets: the tables are sparse, so a row that is added must not hide another one."""

from __future__ import annotations

import pytest

from hf_fastattn.kernels import configs
from hf_fastattn.kernels.configs import Tile, split_kv_tile, tile_of

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


def test_decode_on_hopper_takes_what_was_measured():
    """The tiles that the recorded table of the H200 was measured with; others cost up to half of the speed."""
    for dim in (64, 128):
        assert split_kv_tile(90, 2, dim, 4, 64 * 8, 132) == Tile(64, 64, 4, 5)
        assert split_kv_tile(90, 2, dim, 4, 8, 132) == Tile(16, 128, 4, 5, programs=1)
        assert split_kv_tile(90, 2, dim, 128 * 4, 8, 132) == Tile(64, 64, 4, 5)
