"""Thinned sweeps leave no value out, and `pairwise` no pair of them."""

from __future__ import annotations

import itertools

import pytest

from tests.tools.combinations import in_turn, pairwise, rest_on_a_gpu

AXES = ("abcde", (1, 2, 3), (True, False), "xyzw")


def test_every_pair_comes_together() -> None:
    made = pairwise(*AXES)
    assert len(made) == len(set(made)) < 5 * 4 * 2
    for first, second in itertools.combinations(range(len(AXES)), 2):
        met = {(case[first], case[second]) for case in made}
        assert met == set(itertools.product(AXES[first], AXES[second]))


def test_every_value_comes_in_its_turn() -> None:
    made = in_turn("abcde", (1, 2, 3), (True, False))
    assert made == [("a", 1, True), ("b", 2, False), ("c", 3, True), ("d", 1, False), ("e", 2, True)]
    with pytest.raises(AssertionError):
        in_turn("ab", "xyz")


def test_the_rest_needs_a_gpu() -> None:
    everything = list(itertools.product("ab", (1, 2)))
    made = rest_on_a_gpu(everything[1:3], everything)
    assert made[:2] == everything[1:3] and [case.values for case in made[2:]] == [("a", 1), ("b", 2)]
    assert all([mark.name for mark in case.marks] == ["gpu"] for case in made[2:])
