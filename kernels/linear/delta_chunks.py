"""Packed rows cut into chunks of at most `CHUNK` tokens: what the kernels of a prompt read of their lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# Longer ones take more registers than there are.
CHUNK = 32


class Chunks(NamedTuple):
    """Rows and chunks of a forward, on the device.

    Attributes:
        begins: `[B + 1]` int32, where each row's tokens begin.
        chunks: `[n, 4]` int32: row, first token, tokens, and the row's first token.
    """

    begins: Tensor
    chunks: Tensor


def chunks_of(lengths: Sequence[int], device: torch.device) -> Chunks:
    """The chunks of rows of these lengths; those of a forward are made once for all its layers."""
    return _chunks(tuple(lengths), device)


@functools.lru_cache(maxsize=4)
def _chunks(lengths: tuple[int, ...], device: torch.device) -> Chunks:
    begins = [0, *accumulate(lengths)]
    chunks = [
        (row, first, min(CHUNK, begins[row + 1] - first), begins[row])
        for row in range(len(lengths))
        for first in range(begins[row], begins[row + 1], CHUNK)
    ]
    with torch.inference_mode(False):
        return Chunks(*(torch.tensor(part, dtype=torch.int32, device="cpu").to(device) for part in (begins, chunks)))
