"""Tiles of the products with quantised weights, as data, measured on an H200 with weights of Llama-3-8B's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fastattn.kernels.layer.configs import PROCESSORS


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


# bitsandbytes multiplies with up to four tokens at once, as quickly as with one; with more it dequantises first.
LIBRARYS_TOKENS = 4
# Above this many tokens it may be as quick.
FEW_TOKENS = 16


def is_quicker(tokens: int) -> bool:
    """Whether products with so many tokens are quicker than those of the libraries.

    Measured with one token and with 16 (bitsandbytes 0.50: 1.2 to 1.4 times, and 2.3 to 2.9 times as long).
    """
    return tokens == 1 or LIBRARYS_TOKENS < tokens <= FEW_TOKENS


def codes_tile(k: int, gated: bool) -> RowTile:
    """For `k` columns in 4-bit codes: `columns` are words of eight."""
    held = 512 if k % 4096 == 0 or k >= 8192 else 256 if k >= 1024 else 128
    return RowTile(2 if gated else 4, held, 4 if held > 128 else 2, 1)


@dataclass(frozen=True)
class TokensTile:
    """Launch configuration of a product of several tokens.

    Attributes:
        rows: of each weight a program.
        unrolled: steps of 64 columns whose loads are begun together.
        split: programs that share rows, at most, each with a part of the columns.
    """

    rows: int
    unrolled: int
    warps: int
    stages: int
    split: int


def codes_tokens_tile(rows: int, gated: bool) -> TokensTile:
    """For `rows` of all weights in 4-bit codes, of gate alone if gated: two programs or more a multiprocessor."""
    own = 32 if gated else 64
    split = max(min(6 * PROCESSORS // -(-rows // own), 4), 1)
    return TokensTile(own, 2, 4, 4, split)


def ints_tile(k: int, gated: bool) -> RowTile:
    """For `k` columns of 8 bits."""
    held = 2048 if k % 2048 == 0 or k >= 8192 else 1024 if k >= 1024 else 512
    return RowTile(2 if gated else 4, held, 4 if held > 512 else 2, 2)
