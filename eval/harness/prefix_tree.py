"""`PrefixTree`: the distinct tokens of many sequences, each once, and which of them are computed together.

A node is a run of tokens that the same sequences go through; its children are what follows. A forward computes one
level of nodes on the pages of their parents, so a node of its own costs a pass over the weights, and is worth that only
where enough sequences go through enough tokens. Elsewhere its tokens are put in front of each of its children's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Levels of nodes below each other, at most: deeper ones save little and cost a forward each.
MOST_LEVELS = 4

Tokens = NDArray[np.int64]


@dataclass(eq=False)
class Node:
    """Tokens `first .. last - 1` of all sequences that go through it.

    Attributes:
        sequence: the number of one of these, which has the tokens.
        wanted: the first of its tokens after which somebody asks for logits; `last` if nobody does.
    """

    first: int
    last: int
    sequence: int
    children: list[Node] = field(default_factory=list)
    wanted: int = 0

    @property
    def count(self) -> int:
        """How many tokens it has."""
        return self.last - self.first

    @property
    def saving(self) -> int:
        """Tokens that need not be computed again for its children."""
        return self.count * (len(self.children) - 1)

    def walk(self) -> Iterator[Node]:
        """The node and all below it."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children)


class PrefixTree:
    """The tree of `sequences`, of which nodes that save less than `worth` tokens are put in front of their children.

    Args:
        sequences: distinct, none empty.
        scored: of each, after how many of its last tokens logits are wanted.
        worth: tokens that a node with children has to save.
        levels: nodes below each other, at most.

    Attributes:
        roots: nodes without a parent.
        ends: the node that each sequence ends in.
        distinct: tokens of all sequences, each prefix counted once.
    """

    def __init__(
        self, sequences: Sequence[Tokens], scored: Sequence[int], worth: int = 1, levels: int = MOST_LEVELS
    ) -> None:
        self.roots: list[Node] = []
        self.ends: dict[int, Node] = {}
        self._parents: dict[int, Node] = {}
        self._grow(sequences)
        self.distinct = sum(node.count for root in self.roots for node in root.walk())
        self._join(worth, levels)
        self._want(sequences, scored)

    @property
    def tokens(self) -> int:
        """Tokens that are computed."""
        return sum(node.count for root in self.roots for node in root.walk())

    def way_to(self, sequence: int) -> Iterator[Node]:
        """The nodes that a sequence goes through, the last one first."""
        node: Node | None = self.ends[sequence]
        while node is not None:
            yield node
            node = self._parents.get(id(node))

    def _grow(self, sequences: Sequence[Tokens]) -> None:
        # Big-endian bytes are in the order of the tokens; what a sequence begins with comes before it.
        order = sorted(range(len(sequences)), key=lambda number: sequences[number].astype(">i8").tobytes())
        path: list[Node] = []
        for place, number in enumerate(order):
            tokens = sequences[number]
            common = _common(sequences[order[place - 1]], tokens) if place else 0
            while path and path[-1].first >= common:
                path.pop()
            if path and path[-1].last > common:
                path[-1] = _split(path[-1], common, path[-2].children if len(path) > 1 else self.roots)
            node = Node(common, len(tokens), number)
            (path[-1].children if path else self.roots).append(node)
            path.append(node)
            self.ends[number] = node
        self._know_parents()

    def _know_parents(self) -> None:
        self._parents = {id(child): node for root in self.roots for node in root.walk() for child in node.children}

    def _join(self, worth: int, levels: int) -> None:
        """Put nodes that are not worth a forward in front of their children."""
        nodes = [node for root in self.roots for node in root.walk()]
        kept = {id(node): node for node in nodes if node.children and node.saving >= worth}
        for root in self.roots:
            _drop_deepest(root, kept, levels)
        self.roots = [joined for root in self.roots for joined in _joined(root, root.first, kept)]
        self._know_parents()
        for number, node in self.ends.items():
            # What a node was put in front of computes its tokens too.
            while node.children and id(node) not in kept:
                node = node.children[0]
            self.ends[number] = node

    def _want(self, sequences: Sequence[Tokens], scored: Sequence[int]) -> None:
        for root in self.roots:
            for node in root.walk():
                node.wanted = node.last
        for number, tokens in enumerate(sequences):
            first = len(tokens) - scored[number]
            for node in self.way_to(number):
                if node.first < len(tokens):
                    node.wanted = min(node.wanted, max(first, node.first))
                if node.first <= first:
                    break


def _common(one: Tokens, other: Tokens) -> int:
    """How many first tokens two sequences have in common."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def _split(node: Node, place: int, siblings: list[Node]) -> Node:
    """Cut the last of `siblings` in two at `place`; the first half takes its place, the second one is its child."""
    front = Node(node.first, place, node.sequence, [node])
    node.first = place
    siblings[-1] = front
    return front


def _drop_deepest(root: Node, kept: dict[int, Node], levels: int) -> None:
    """Take from `kept` the nodes that save least, until no way down has more than `levels` nodes, the last one included."""
    waiting: list[tuple[Node, list[Node]]] = [(root, [])]
    while waiting:
        node, above = waiting.pop()
        above = [one for one in above if id(one) in kept]
        if not node.children:
            while len(above) >= levels:
                least = min(above, key=lambda one: one.saving)
                above.remove(least)
                del kept[id(least)]
        elif id(node) in kept:
            above = [*above, node]
        waiting.extend((child, above) for child in node.children)


def _joined(node: Node, first: int, kept: dict[int, Node]) -> list[Node]:
    """The node from token `first` on, with what is below it; its children instead, if it is not worth a forward."""
    waiting: list[tuple[Node, int, list[Node]]] = []
    found: list[Node] = []
    waiting.append((node, first, found))
    while waiting:
        one, begin, into = waiting.pop()
        children = one.children
        if children and id(one) not in kept:
            waiting.extend((child, begin, into) for child in children)
            continue
        one.first = begin
        into.append(one)
        one.children = []
        waiting.extend((child, child.first, one.children) for child in children)
    return found
