"""Which rows of several tensors are equal, byte by byte."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

# Odd, and without a pattern in its bits: 2**64 over the golden ratio, as a signed number (Knuth, 1998, vol. 3, 6.4).
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64


def numbers_of_rows(tensors: Sequence[Tensor]) -> list[int]:
    """For each row of `tensors`, `[B, ...]` each, its number among the different ones, counted from 0.

    Integers on a GPU are compared there: to copy and hash them on the host takes milliseconds.
    """
    rows = tensors[0].shape[0]
    tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
    there = [tensor for tensor in tensors if tensor.is_cuda and not tensor.is_floating_point()]
    return numbers_by_sums(tensors, there) if there else numbers_of_keys(_bytes_of_rows(tensors, rows))


def numbers_by_sums(tensors: Sequence[Tensor], there: Sequence[Tensor]) -> list[int]:
    """The same, for rows of which at least the integers `there` are compared by sums that equal rows share, then in full."""
    words = [tensor.contiguous().flatten(1).to(torch.int64) for tensor in there]
    sums = torch.stack([_sums(rows) for rows in words], 1)
    others = [tensor for tensor in tensors if not any(tensor is one for one in there)]
    keys: list[Hashable] = [tuple(row) for row in sums.tolist()]
    if others and len(set(keys)) < len(keys):
        keys = list(zip(keys, _bytes_of_rows(others, len(keys)), strict=True))
    numbers = numbers_of_keys(keys)
    if max(numbers) + 1 == len(numbers):
        return numbers
    same = torch.tensor([numbers.index(number) for number in numbers], device=sums.device)
    agree = torch.stack([(rows == rows.index_select(0, same)).all() for rows in words]).all()
    return numbers if bool(agree) else numbers_of_keys(_bytes_of_rows(tensors, len(keys)))


def numbers_of_keys(keys: Sequence[Hashable]) -> list[int]:
    """For each key its number among the different ones, counted from 0."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _bytes_of_rows(tensors: Sequence[Tensor], rows: int) -> list[tuple[bytes, ...]]:
    host = [tensor.cpu().contiguous().flatten(1).view(torch.uint8).numpy() for tensor in tensors]
    return [tuple(own[row].tobytes() for own in host) for row in range(rows)]


def _sums(words: Tensor) -> Tensor:
    """`[B]` int64, equal for equal rows; of others rarely."""
    factors = torch.arange(1, 2 * words.shape[1], 2, device=words.device) * _MULTIPLIER
    return ((words ^ (words << 21)) * (factors ^ (factors >> 29))).sum(1)
