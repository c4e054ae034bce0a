"""Masks of columns on the host, by NumPy: PyTorch wakes all cores for small operations, which takes milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def after_padding(tokens: Sequence[int], columns: int) -> Tensor:
    """`[B, columns]` bool: of row b the last `tokens[b]` columns."""
    first = columns - np.asarray(tokens, np.int64)
    return torch.from_numpy(np.arange(columns) >= first[:, None])


def beside(*masks: Tensor) -> Tensor:
    """`[B, sum of their columns]` bool: masks `[B, n]`, one after the other."""
    return torch.from_numpy(np.concatenate([_array(mask) for mask in masks], 1))


def longer(mask: Tensor, columns: int, value: bool) -> Tensor:
    """`[B, n + columns]` bool: a copy of the mask `[B, n]`, and columns of `value` after it."""
    return beside(mask, torch.from_numpy(np.full((len(mask), columns), value)))


def all_shown(mask: Tensor) -> bool:
    """Whether the mask shows every column."""
    return bool(_array(mask).all())


def shows_more(mask: Tensor, stored: Tensor) -> bool:
    """Whether the mask shows a column that `stored`, of the same shape, does not."""
    return bool((_array(mask) > _array(stored)).any())


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two masks are the same."""
    return bool(np.array_equal(_array(one), _array(other)))


def _array(mask: Tensor) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = mask.numpy()
    return found
