"""Ratios of sums with their standard errors over clusters: means per token, mean squares, and ratios of those.

Tokens of one document are alike, so documents are the units that vary (windows, if there are few documents). For units
with sums `a_i` and `b_i` the ratio estimate is `R = sum a / sum b`, its variance that of the residuals
`a_i - R b_i` (Cochran, 1977, "Sampling Techniques", chapter 6), its interval Student's with one degree less than units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

# Fewer documents than this, and windows are the units instead.
MIN_CLUSTERS = 8
# Alarms use this level: with a few hundred checks over many seeds, chance alone stays silent.
ALARM_LEVEL = 0.999


@dataclass(frozen=True)
class Estimate:
    """A ratio, its standard error, and how many units it varies over."""

    value: float
    se: float
    units: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The confidence interval."""
        half = student_t(level, self.units - 1) * self.se
        return self.value - half, self.value + half

    def largest(self, level: float = ALARM_LEVEL) -> float:
        """The largest magnitude inside the interval."""
        return max(map(abs, self.interval(level)))


def student_t(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t (Abramowitz and Stegun, 1964, 26.7.5); infinite without freedom."""
    if freedom < 1:
        return math.inf
    z, n = NormalDist().inv_cdf((1 + level) / 2), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """`sum a / sum b` over units, with its standard error; a single unit has none (infinite)."""
    a, b = np.asarray(numerators, float), np.asarray(denominators, float)
    count, total = len(a), b.sum()
    value = float(a.sum() / total) if total else math.nan
    if count < 2 or not total:
        return Estimate(value, math.inf, count)
    spread = math.sqrt(float(((a - value * b) ** 2).sum()) * count / (count - 1)) / abs(total)
    return Estimate(value, spread, count)


def paired_shares(won: int, lost: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of the difference of two shares, of `count` pairs of which `won` and `lost` differ.

    Half a pair is added to each of the four cells (Agresti and Min, 2005, "Simple improved confidence intervals for
    comparing matched proportions"): pairs that are all alike do not show that there is no difference.
    """
    pairs = count + 2
    middle = (won - lost) / pairs
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((won + lost + 1) / pairs**2 - middle**2 / pairs)
    return middle - half, middle + half


class Clusters:
    """Windows grouped into units.

    Args:
        documents: the document of each window.
    """

    def __init__(self, documents: Sequence[int]) -> None:
        known = {document: unit for unit, document in enumerate(dict.fromkeys(documents))}
        by_document = len(known) >= MIN_CLUSTERS
        self.kind = "documents" if by_document else "windows"
        self.unit = np.array([known[d] for d in documents] if by_document else range(len(documents)), dtype=int)
        self.count = len(set(self.unit.tolist()))

    def sums(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """The sum of each unit's values, from one array of values a window."""
        return np.bincount(self.unit, [float(np.sum(values)) for values in windows], minlength=self.count)

    def mean(self, windows: Sequence[np.ndarray]) -> Estimate:
        """Mean of all values."""
        return ratio(self.sums(windows), self.sums([np.ones(len(values)) for values in windows]))

    def ratio_of_squares(self, windows: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Estimate:
        """Mean square of the one over that of the other."""
        return ratio(self.sums([v**2 for v in windows]), self.sums([v**2 for v in others]))
