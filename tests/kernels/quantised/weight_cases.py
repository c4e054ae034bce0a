"""Quantised weights of random codes, in the libraries' layouts, without the libraries."""

from __future__ import annotations

import torch

from hf_fastattn.kernels.quantised.weights import BlockCodes, Nested, QuantisedWeight, RowInts, TiledInts


def block_codes(
    rows: int, columns: int, kind: str = "nf4", block: int = 64, nested: bool = True, device: str = "cpu", seed: int = 0
) -> BlockCodes:
    """Codes of all values, magnitudes of about `columns ** -0.5`."""
    draw = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=device, generator=draw)
    blocks = rows * columns // block
    if not nested:
        absmax = torch.rand(blocks, device=device, generator=draw) * columns**-0.5
        return BlockCodes(codes, rows, columns, kind, block, absmax)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device, generator=draw)
    scales = torch.rand(-(-blocks // 256), device=device, generator=draw) * columns**-0.5
    values = torch.randn(256, device=device, generator=draw)
    offset = torch.tensor(columns**-0.5, device=device)
    return BlockCodes(codes, rows, columns, kind, block, absmax, Nested(scales, values, offset))


def tiled_ints(rows: int, columns: int, group: int = 128, device: str = "cpu", seed: int = 0) -> TiledInts:
    draw = torch.Generator(device).manual_seed(seed)
    shape = (-(-rows // 8), columns // 128, 32, 4)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, device=device, generator=draw)
    scales = torch.randn(columns // group, 8 * shape[0], 2, device=device, generator=draw) * columns**-0.5 / 4
    return TiledInts(words.int(), scales.bfloat16(), rows, group)


def row_ints(rows: int, columns: int, scales: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> RowInts:
    draw = torch.Generator(device).manual_seed(seed)
    integers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, device=device, generator=draw)
    held = torch.rand(rows, device=device, generator=draw) * columns**-0.5 / 64
    return RowInts(integers, held.to(scales))


def of_kind(kind: str, rows: int, columns: int, device: str = "cpu", seed: int = 0) -> QuantisedWeight:
    """A weight by a short name."""
    if kind == "ints":
        return row_ints(rows, columns, device=device, seed=seed)
    if kind == "tiled":
        return tiled_ints(rows, columns, device=device, seed=seed)
    name, _, flat = kind.partition(" ")
    return block_codes(rows, columns, name, nested=not flat, device=device, seed=seed)


KINDS = ("nf4", "nf4 flat", "fp4", "tiled", "ints")
