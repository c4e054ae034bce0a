"""The limit of `eval logprobs` where stock's two ways do not differ at all, and where they do."""

from __future__ import annotations

import numpy as np
import pytest

from hf_fastattn.eval.accuracy.estimates import Clusters
from hf_fastattn.eval.accuracy.logprobs_summary import _checks


@pytest.mark.parametrize("apart", [0.0, 1e-6])
def test_differences_of_the_size_of_rounding_are_green_and_larger_ones_red(apart: float) -> None:
    """Equal to the bit is what stock's ways are in some shapes; what nothing can be divided by is no limit then."""
    noise = np.random.default_rng(0)

    def windows(size: float) -> list[np.ndarray]:
        return [noise.normal(0, size, 16) for _ in range(4)]

    stock, error = windows(apart) if apart else [np.zeros(16)] * 4, windows(1e-6)
    for size, alarms in ((1e-6, False), (1e-4, True)):
        found = _checks("ours", Clusters([0, 1, 2, 3]), windows(size), stock, error, 1e-7)
        assert [check.alarms for check in found] == [alarms, alarms], size
