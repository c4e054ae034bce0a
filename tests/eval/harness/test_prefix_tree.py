"""The tree of prefixes against sets of prefixes: each token once, every sequence covered, few levels."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hf_fastattn.eval.harness.prefix_tree import PrefixTree


def sequences_of(seed: int, count: int = 40) -> list[np.ndarray]:
    """Distinct sequences of few kinds of tokens, many of which begin alike, and some of which others go on from."""
    rng = random.Random(seed)
    found: set[tuple[int, ...]] = set()
    while len(found) < count:
        before = rng.choice(sorted(found)) if found and rng.random() < 0.7 else ()
        kept = before[: rng.randint(0, len(before))]
        found.add((*kept, *(rng.randrange(4) for _ in range(rng.randint(1, 9)))))
    return [np.array(one) for one in sorted(found, key=lambda _: rng.random())]


def covered(tree: PrefixTree, sequences: list[np.ndarray]) -> None:
    """Assert that the nodes on the way to each sequence hold its tokens, without a gap, and one of its own at its end."""
    for number, tokens in enumerate(sequences):
        last = None
        for node in tree.way_to(number):
            assert last is None or node.last == last
            stop = min(node.last, len(tokens))
            held = sequences[node.sequence][node.first : stop]
            assert np.array_equal(held, tokens[node.first : stop])
            last = node.first
        assert last == 0 and tree.ends[number].first < len(tokens) <= tree.ends[number].last


@pytest.mark.parametrize("seed", range(6))
def test_each_prefix_is_there_once(seed: int) -> None:
    sequences = sequences_of(seed)
    tree = PrefixTree(sequences, [1] * len(sequences), levels=99)
    prefixes = {tuple(tokens[:count]) for tokens in sequences for count in range(1, len(tokens) + 1)}
    assert tree.distinct == tree.tokens == len(prefixes)
    covered(tree, sequences)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("worth", [1, 6, 10**6])
def test_nodes_that_are_not_worth_a_forward_are_computed_with_their_children(worth: int, levels: int) -> None:
    sequences = sequences_of(7)
    tree = PrefixTree(sequences, [2] * len(sequences), worth, levels)
    covered(tree, sequences)
    assert tree.distinct <= tree.tokens <= sum(map(len, sequences))
    for number in range(len(sequences)):
        assert len(list(tree.way_to(number))) <= levels
    if worth == 1 and levels == 3:
        assert tree.tokens < 1.5 * tree.distinct
    if worth > 6:
        assert not any(root.children for root in tree.roots)


@pytest.mark.parametrize("seed", range(3))
def test_logits_are_wanted_after_the_last_tokens_of_each(seed: int) -> None:
    sequences = sequences_of(seed)
    rng = random.Random(seed)
    scored = [rng.randint(1, len(tokens)) for tokens in sequences]
    tree = PrefixTree(sequences, scored, 3)
    for number, tokens in enumerate(sequences):
        places: set[int] = set()
        for node in tree.way_to(number):
            places |= set(range(node.wanted, node.last))
        assert set(range(len(tokens) - scored[number], len(tokens))) <= places
    # A context whose only use is to be gone on from has no logits.
    far = PrefixTree([np.arange(9), np.array([0, 1, 2, 3, 9])], [2, 1])
    assert [root.wanted for root in far.roots] == [4]
