"""`RowTokens`: what arrives late is for those whom it was chosen for, and for nobody who has got their place since."""

from __future__ import annotations

import numpy as np

from hf_fastattn.batching.row_tokens import NO_TOKEN, RowTokens


def tickets(held: RowTokens, places: list[int]) -> np.ndarray:
    return np.array([(place, held.serials[place] if place >= 0 else -1) for place in places], np.int64)


def test_tokens_of_requests_that_have_ended_are_dropped() -> None:
    held = RowTokens()
    first = held.open(5, {7}, False)
    before = tickets(held, [first, -1])
    assert held.take(before, np.array([3, 4])) == ([first], [], [])
    assert held.of(first) == [3]
    held.close(first)
    second = held.open(5, set(), True)
    assert second == first
    assert held.take(before, np.array([9, 9])) == ([], [], [])
    assert held.take(tickets(held, [-1, second]), np.array([1, 7])) == ([second], [], [second])
    assert held.of(second) == [7]


def test_ends_and_limits() -> None:
    held = RowTokens()
    places = [held.open(2, {3, 5}, True), held.open(1, set(), True), held.open(9, {NO_TOKEN}, False)]
    assert held.take(tickets(held, places), np.array([5, 6, 7]))[1] == places[:2]
    assert held.take(tickets(held, places[2:]), np.array([3])) == ([], [], [])


def test_many_places_and_tokens() -> None:
    held = RowTokens()
    places = [held.open(10**6, set(), False) for _ in range(300)]
    assert len(set(places)) == 300
    for step in range(200):
        held.take(tickets(held, places), np.arange(300) + step)
    assert held.of(places[7]) == [held_token + 7 for held_token in range(200)]
