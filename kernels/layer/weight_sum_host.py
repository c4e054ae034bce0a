"""Sums over the bits of tensors in the host's memory, by NumPy and in several threads: see `weight_sum.py`.

NumPy adds integers at several times the speed of PyTorch. What it reads in order is added up lane by lane in chunks of ROWS
rows; between chunks the sums are mixed, which is no linear function of them. Both numbers are such that a change that
weights may undergo is seen: LANES is a prime, so that the rows of a matrix do not share lanes within a chunk, and ROWS is
odd, so that changes of the highest bit of every word do not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES, ROWS = 8191, 63
# Words of a piece, which one thread adds up; lists of pieces, which do not depend on the number of threads.
PIECE, PARTS = 16 * ROWS * LANES, 16
# Fewer words than this are not worth a second thread.
WORTH_A_THREAD = 2**20
ODD = 0x5851F42D4C957F2D

Words = NDArray[np.int64]


def host_sum(tensors: Sequence[Tensor]) -> list[int]:
    """PARTS sums over the bits of tensors on the host; other ones than those of `weight_sum_reference`."""
    pieces = [words[start : start + PIECE] for words in map(_words, tensors) for start in range(0, len(words), PIECE)]
    parts = [pieces[number::PARTS] for number in range(PARTS)]
    threads = min(torch.get_num_threads(), PARTS, sum(map(len, pieces)) // WORTH_A_THREAD)
    if threads < 2:
        return [_sum_of(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(_sum_of, parts))


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


def _sum_of(pieces: list[Words]) -> int:
    if not pieces:
        return 0
    total, scratch = np.zeros(LANES, np.int64), np.empty(LANES, np.int64)
    for piece in pieces:
        whole = len(piece) // (ROWS * LANES) * ROWS * LANES
        for chunk in piece[:whole].reshape(-1, ROWS, LANES):
            _mix(total, scratch)
            np.add.reduce(chunk, 0, out=scratch)
            np.add(total, scratch, out=total)
        for start in range(whole, len(piece), LANES):
            row = piece[start : start + LANES]
            _mix(total[: len(row)], scratch[: len(row)])
            np.add(total[: len(row)], row, out=total[: len(row)])
    _mix(total, scratch)
    np.multiply(total, np.arange(LANES, dtype=np.int64) * 2 + ODD, out=total)
    _mix(total, scratch)
    return int(np.add.reduce(total))


def _mix(total: Words, scratch: Words) -> None:
    """Each sum becomes another number, by a function that is no linear one and keeps different sums apart."""
    np.right_shift(total, 29, out=scratch)
    np.bitwise_xor(total, scratch, out=total)
    np.multiply(total, -3, out=total)
