"""Tests of numbers that have to be uniform on (0, 1) and independent of each other, and Holm's correction of many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

# Cells that numbers fall into, on a line, and on each side of a square.
BINS, SIDE = 40, 5
# Of the numbers, those that the least likely tokens are drawn by.
TAIL = 0.03
# Numbers that a cell has to expect for the chi-squared distribution to hold (Cochran, 1954).
EXPECTED = 5


def chi_squared(observed: Numbers, expected: Numbers, freedom: int) -> float:
    """Pearson's test: the probability of counts as far from what is expected."""
    statistic = float(((observed - expected) ** 2 / expected).sum())
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64, device="cpu")
    return float(torch.special.gammaincc(half[0], half[1]))


def uniform(numbers: Numbers) -> float:
    """The p-value of numbers being uniform on (0, 1); NaN entries are none. 1 if there are too few to tell."""
    known = numbers[~np.isnan(numbers)]
    bins = min(BINS, len(known) // EXPECTED)
    if bins < 2:
        return 1.0
    counts = np.bincount(np.minimum((known * bins).astype(int), bins - 1), minlength=bins).astype(float)
    return chi_squared(counts, np.full(bins, len(known) / bins), bins - 1)


def tail(numbers: Numbers) -> float:
    """The p-value of as many numbers above 1 - TAIL: there the least likely tokens are, which a threshold leaves out."""
    known = numbers[~np.isnan(numbers)]
    if len(known) * TAIL < EXPECTED:
        return 1.0
    above = float((known > 1 - TAIL).sum())
    expected = np.array([TAIL, 1 - TAIL]) * len(known)
    return chi_squared(np.array([above, len(known) - above]), expected, 1)


def sums_to_nothing(deviations: Numbers, variances: Numbers) -> float:
    """The p-value of the sum of deviations, each of mean 0 whatever came before, being as far from 0; 1 if there are few."""
    variance = float(np.nansum(variances))
    return math.erfc(abs(float(np.nansum(deviations))) / math.sqrt(2 * variance)) if variance >= EXPECTED else 1.0


def independent(one: Numbers, other: Numbers) -> float:
    """The p-value of the two numbers of pairs being independent, whatever their distributions; 1 if there are too few."""
    both = ~(np.isnan(one) | np.isnan(other))
    side = min(SIDE, int((both.sum() / EXPECTED) ** 0.5))
    if side < 2:
        return 1.0
    cells = [np.minimum((numbers[both] * side).astype(int), side - 1) for numbers in (one, other)]
    counts = np.bincount(cells[0] * side + cells[1], minlength=side * side).reshape(side, side).astype(float)
    rows, columns = counts.sum(1), counts.sum(0)
    counts, rows, columns = counts[rows > 0][:, columns > 0], rows[rows > 0], columns[columns > 0]
    if min(counts.shape) < 2:
        # All numbers of one side are alike, which `uniform` is there for.
        return 1.0
    return chi_squared(counts, np.outer(rows, columns) / both.sum(), (len(rows) - 1) * (len(columns) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number: the chance of one as small among all is at most that (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, least = [0.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = least
    return corrected
