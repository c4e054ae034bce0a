"""Fewer cases than the product of several lists of values, where no fault is expected to need three of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Of all combinations as many as it takes for every two values of two axes to come together."""
    everything = list(itertools.product(*(range(len(axis)) for axis in axes)))
    left = {pair for chosen in everything for pair in _pairs(chosen)}
    kept = []
    while left:
        best = max(everything, key=lambda chosen: len(left & _pairs(chosen)))
        left -= _pairs(best)
        kept.append(best)
    return [tuple(axis[place] for axis, place in zip(axes, chosen, strict=True)) for chosen in sorted(kept)]


def in_turn(longest: Sequence[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every value of the longest axis once, each with the next value of the others."""
    assert all(len(other) <= len(longest) for other in others)
    return list(zip(longest, *(itertools.islice(itertools.cycle(other), len(longest)) for other in others), strict=True))


def rest_on_a_gpu(chosen: Sequence[tuple[Any, ...]], everything: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The chosen cases, and the others of `everything` where there is a GPU: kernels differ more than references do."""
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.gpu) for case in everything if case not in chosen)]


def _pairs(chosen: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    return set(itertools.combinations(enumerate(chosen), 2))
