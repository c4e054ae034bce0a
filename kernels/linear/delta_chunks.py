"""Packed rows cut into chunks of a few tokens: what the kernels of a prompt read of their lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens of a chunk, in 16 bits and in fp32, where products are in three parts: longer ones take too many registers.
CHUNK, CHUNK_32 = 32, 16


class Chunks(NamedTuple):
    """Rows and chunks of a forward, on the device.

    Attributes:
        begins: `[B + 1]` int32, where each row's tokens begin.
        chunks: `[n, 4]` int32: row, first token, tokens, and the row's first token.
        size: tokens of a chunk, at most.
    """

    begins: Tensor
    chunks: Tensor
    size: int


def chunks_of(lengths: Sequence[int], device: torch.device, dtype: torch.dtype) -> Chunks:
    """The chunks of rows of these lengths; those of a forward are made once for all its layers."""
    return _chunks(tuple(lengths), device, CHUNK_32 if dtype is torch.float32 else CHUNK)


@functools.lru_cache(maxsize=4)
def _chunks(lengths: tuple[int, ...], device: torch.device, size: int) -> Chunks:
    begins = [0, *accumulate(lengths)]
    chunks = [
        (row, first, min(size, begins[row + 1] - first), begins[row])
        for row in range(len(lengths))
        for first in range(begins[row], begins[row + 1], size)
    ]
    with torch.inference_mode(False):
        return Chunks(_uploaded(begins, device), _uploaded(chunks, device), size)


def _uploaded(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu").to(device)
