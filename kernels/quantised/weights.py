"""Quantised weights as the libraries store them, for kernels that dequantise in registers: no second copy is made.

| class | of | a weight is |
|---|---|---|
| `BlockCodes` | bitsandbytes, 4 bits (Dettmers et al., 2023) | one of 16 values times the largest magnitude of its block |
| `TiledInts` | PyTorch's tinygemm, 4 bits, by torchao | an integer times a scale and plus an offset of its group |
| `RowInts` | torchao, 8 bits | an integer times a scale of its row |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# The values of bitsandbytes' 4-bit types, by their code.
VALUES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
        0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
    ),
}  # fmt: skip
# Blocks whose magnitudes share a scale, where these are quantised too ("double quantisation").
NESTED_BLOCK = 256
# Weights that a 16-byte word of codes holds: blocks are no smaller.
LEAST_BLOCK = 32
# tinygemm's tiles: rows, columns. It pads columns to a multiple of eight tiles.
TILE_ROWS, TILE_COLUMNS, PADDED_COLUMNS = 8, 128, 1024


@dataclass(frozen=True)
class Nested:
    """Magnitudes of blocks in 8 bits: `levels[code] * absmax[block // 256] + offset`.

    Attributes:
        absmax: `[blocks / 256]` fp32.
        levels: `[256]` fp32.
        offset: fp32, of one element.
    """

    absmax: Tensor
    levels: Tensor
    offset: Tensor


@dataclass(frozen=True)
class BlockCodes:
    """`[N, K]` weights of bitsandbytes in 4 bits: `VALUES[kind][code] * absmax[block]`, blocks along K.

    Attributes:
        codes: `[N * K / 2]` uint8, two codes each, the earlier column in the upper four bits.
        rows, columns: N and K.
        kind: `"nf4"` or `"fp4"`.
        block: columns that share a magnitude; divides K.
        absmax: `[N * K / block]` fp32, or uint8 codes of `nested`.
    """

    codes: Tensor
    rows: int
    columns: int
    kind: str
    block: int
    absmax: Tensor
    nested: Nested | None = None


@dataclass(frozen=True)
class TiledInts:
    """`[N, K]` weights in tinygemm's order: `(q - 8) * scale + offset`, q from 0 to 15.

    A tile has 8 rows and 128 columns. Lane `l` of 32 holds four words of row `l / 4`, word i the columns `32 i + 2 (l % 4) +
    {0, 1, 8, 9, 16, 17, 24, 25}`, from its lowest bits on; the even ones in the word's lower half, the odd in its upper.

    Attributes:
        words: `[N / 8, K / 128, 32, 4]` int32; N rounded up.
        scales: `[K / group, N, 2]` bf16, scale and offset of each group of columns; N rounded up to 8.
        rows: N; the last tile may have more.
        group: columns that share a scale.
    """

    words: Tensor
    scales: Tensor
    rows: int
    group: int

    @property
    def columns(self) -> int:
        return TILE_COLUMNS * self.words.shape[1]


@dataclass(frozen=True)
class RowInts:
    """`[N, K]` weights in 8 bits: `q * scale[row]`.

    Attributes:
        integers: `[N, K]` int8.
        scales: `[N]` fp32 or of 16 bits.
    """

    integers: Tensor
    scales: Tensor

    @property
    def rows(self) -> int:
        return self.integers.shape[0]

    @property
    def columns(self) -> int:
        return self.integers.shape[1]


QuantisedWeight: TypeAlias = BlockCodes | TiledInts | RowInts


def tensors_of(weight: QuantisedWeight) -> tuple[Tensor, ...]:
    """All that kernels read of a weight."""
    if isinstance(weight, BlockCodes):
        of = weight.nested
        return (weight.codes, weight.absmax, *(() if of is None else (of.absmax, of.levels, of.offset)))
    return (weight.words, weight.scales) if isinstance(weight, TiledInts) else (weight.integers, weight.scales)


def why_not_weight(weight: QuantisedWeight, device: torch.device) -> str | None:
    """Why kernels on the device cannot read a weight; None if they can."""
    for tensor in tensors_of(weight):
        if tensor.device != device or not tensor.is_contiguous():
            return f"a quantised weight on {tensor.device} with strides {tensor.stride()} for x on {device}"
    n, k = weight.rows, weight.columns
    if isinstance(weight, BlockCodes):
        return _why_not_codes(weight, n, k)
    if isinstance(weight, TiledInts):
        return _why_not_tiles(weight, n, k)
    if weight.integers.dtype is not torch.int8 or weight.scales.shape != (n,) or not weight.scales.is_floating_point():
        return f"integers {weight.integers.dtype} with scales {tuple(weight.scales.shape)} for [{n}, {k}]"
    return None


def _why_not_codes(weight: BlockCodes, n: int, k: int) -> str | None:
    blocks, of = n * k // weight.block, weight.nested
    if weight.kind not in VALUES or weight.block < LEAST_BLOCK or weight.block & (weight.block - 1) or k % weight.block:
        return f"{weight.kind} in blocks of {weight.block} for {k} columns"
    if weight.codes.dtype is not torch.uint8 or 2 * weight.codes.numel() != n * k or weight.absmax.numel() != blocks:
        return f"{weight.codes.numel()} codes with {weight.absmax.numel()} magnitudes for [{n}, {k}]"
    if of is None:
        return None if weight.absmax.dtype is torch.float32 else f"magnitudes of {weight.absmax.dtype}"
    wide = all(tensor.dtype is torch.float32 for tensor in (of.absmax, of.levels, of.offset))
    sizes = of.absmax.numel() == -(-blocks // NESTED_BLOCK) and of.levels.numel() == 256 and of.offset.numel() == 1
    known = weight.absmax.dtype is torch.uint8 and wide and sizes
    return None if known else f"nested magnitudes of {weight.absmax.dtype} with {of.absmax.numel()} scales for {blocks}"


def _why_not_tiles(weight: TiledInts, n: int, k: int) -> str | None:
    tiles = -(-n // TILE_ROWS)
    if weight.words.dtype is not torch.int32 or weight.words.shape != (tiles, k // TILE_COLUMNS, 32, 4):
        return f"words {weight.words.dtype} {tuple(weight.words.shape)} for [{n}, {k}]"
    if weight.group % TILE_COLUMNS or k % weight.group or k % PADDED_COLUMNS:
        return f"groups of {weight.group} in {k} columns"
    if weight.scales.dtype is not torch.bfloat16 or weight.scales.shape != (k // weight.group, TILE_ROWS * tiles, 2):
        return f"scales {weight.scales.dtype} {tuple(weight.scales.shape)} for [{n}, {k}]"
    return None
