"""Sums over the bits of tensors in the host's memory, by NumPy and in several threads: see `weight_sum.py`.

All words are taken as one sequence, in rows of LANES words that are added up lane by lane, and every ROWS rows the sums are
mixed, which is no linear function of them. Both numbers are such that a change that weights may undergo is seen: LANES is a
prime, so that the rows of a matrix, and tensors of one shape, do not share lanes between two mixes, and ROWS is odd, so that
changes of the highest bit of every word do not cancel. What is not seen: changes between two mixes at a distance of a
multiple of LANES words whose differences add up to nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES, ROWS = 8191, 63
# Words that are summed by themselves, at least, and the most such parts, which do not depend on the number of threads.
PART, PARTS = 2**20, 16
ODD = 0x5851F42D4C957F2D
# Words of embeddings that are mixed at a time: these stay in a processor's cache.
BLOCK = 2**15

Words = NDArray[np.int64]


def host_sum(tensors: Sequence[Tensor]) -> list[int]:
    """Sums over the bits of tensors on the host; other ones than those of `weight_sum_reference`."""
    return sum_of_words([_words(tensor) for tensor in tensors])


def whole_words(tensors: Sequence[Tensor]) -> list[Words] | None:
    """The bits of tensors by their addresses, without holding their memory; None if not all are on the host, in whole words.

    Whoever keeps them has to know, before each use, that the tensors are there, and where and as large as they were.
    """
    for tensor in tensors:
        whole = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.data_ptr() % 8 == 0
        if not whole or tensor.numel() * tensor.element_size() % 8:
            return None
    return [_words_at(tensor.data_ptr(), tensor.numel() * tensor.element_size() // 8) for tensor in tensors]


def sum_of_words(words: Sequence[Words]) -> list[int]:
    """The sums of `host_sum`, of the bits of tensors: of at most PARTS parts of the sequence, one after the other."""
    total = sum(map(len, words))
    parts = list(_divided(words, -(-total // min(PARTS, max(total // PART, 1)))))
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2:
        return [_sum_of(part) for part in parts]
    sums, numbers = [0] * len(parts), iter(range(len(parts)))

    def take() -> None:
        for number in numbers:
            sums[number] = _sum_of(parts[number])

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(take) for _ in range(threads - 1)]
        take()
    for other in others:
        other.result()
    return sums


def row_sums(weight: Tensor, rows: NDArray[np.int64]) -> Words:
    """For each of these rows of a matrix in the host's memory a sum over its bits alone, which is never 0.

    Args:
        weight: `[n, width]`, whose rows are whole words of 8 bytes.
        rows: `[count]`.
    """
    bits = weight.detach().view(torch.int64).numpy()
    factors, step = _odd_numbers(bits.shape[1]), max(BLOCK // bits.shape[1], 1)
    found = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), step):
        block = bits[rows[start : start + step]]
        # The same mix as between rows of lanes, with another factor at every place.
        block ^= block >> 29
        np.einsum("rw,w->r", block, factors, out=found[start : start + step])
    found[found == 0] = 1
    return found


def _words_at(address: int, count: int) -> Words:
    return np.frombuffer(memoryview((ctypes.c_int64 * count).from_address(address)), np.int64)


def _words(tensor: Tensor) -> Words:
    """The bits of a tensor; those of what is no multiple of a word are padded in a copy."""
    flat = tensor.detach().reshape(-1)
    size = flat.numel() * flat.element_size()
    if size % 8 or flat.data_ptr() % 8:
        bits = flat.contiguous().view(torch.uint8)
        flat = bits.new_zeros(-(-size // 8) * 8)
        flat[:size] = bits
    found: Words = flat.view(torch.int64).numpy()
    return found


def _divided(words: Sequence[Words], size: int) -> Iterator[list[Words]]:
    """The sequence of words in parts of `size`."""
    part, room = list[Words](), size
    for piece in words:
        rest = piece
        while len(rest) > room:
            yield [*part, rest[:room]]
            part, rest, room = [], rest[room:], size
        part.append(rest)
        room -= len(rest)
    yield part


def _sum_of(words: Sequence[Words]) -> int:
    total, scratch = np.zeros(LANES, np.int64), np.empty(LANES, np.int64)
    # Whole rows since the last mix, and where in the next one the sequence has come to.
    rows = lane = 0
    for piece in words:
        start = 0
        while start < len(piece):
            if lane == 0 and rows == ROWS:
                _mix(total, scratch)
                rows = 0
            count = (len(piece) - start) // LANES if lane == 0 else 0
            if count < 2:
                row = piece[start : start + LANES - lane]
                lanes = total[lane : lane + len(row)]
                np.add(lanes, row, out=lanes)
                start, lane = start + len(row), (lane + len(row)) % LANES
                rows += lane == 0
                continue
            count = min(count, ROWS - rows)
            np.add.reduce(piece[start : start + count * LANES].reshape(count, LANES), 0, out=scratch)
            np.add(total, scratch, out=total)
            start, rows = start + count * LANES, rows + count
    _mix(total, scratch)
    if lane == 0 and rows % 2 == 0 and words:
        # An even number of words in every lane, the highest bits of which would cancel: some of them once more.
        row = words[-1][-LANES:]
        np.add(total[: len(row)], row, out=total[: len(row)])
        _mix(total, scratch)
    np.multiply(total, _odd_numbers(LANES), out=total)
    _mix(total, scratch)
    return int(np.add.reduce(total))


def _mix(total: Words, scratch: Words) -> None:
    """Each sum becomes another number, by a function that is no linear one and keeps different sums apart."""
    np.right_shift(total, 29, out=scratch)
    np.bitwise_xor(total, scratch, out=total)
    np.multiply(total, -3, out=total)


@functools.lru_cache(maxsize=8)
def _odd_numbers(count: int) -> Words:
    return np.arange(count, dtype=np.int64) * 2 + ODD
