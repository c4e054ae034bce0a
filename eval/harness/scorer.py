"""`PrefixScorer`: log-probabilities of continuations, of which each common prefix is computed once.

A forward computes the nodes of one level of a `PrefixTree`: their rows are forks of the rows that hold their parents, so
that pages are shared, and new tokens alone are computed, without padding. Logits are computed only after the columns
that a continuation is predicted from. Log-softmax, sum and arg max are lm-evaluation-harness's, in its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_fastattn.cache.cache_state import PATIENCE
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.eval.harness.prefix_tree import MOST_LEVELS, Node, PrefixTree
from hf_fastattn.generation.prompt_tokens import why_not_model
from hf_fastattn.pages.page_pool import CacheFullError
from hf_fastattn.patching import find_model
from hf_fastattn.search import append, fork

# Tokens that a node of its own has to save: on a GPU a forward of few tokens takes as long as one of a few dozen.
WORTH_GPU, WORTH_CPU = 32, 8
# Tokens of one forward that a batch size never makes fewer, and that `auto` asks for.
LEAST_TOKENS, AUTO_TOKENS = 2048, 16384
# Elements of the logits of one forward, at most, where it has several rows.
MOST_LOGITS = 2**28
# Elements of logits that are made log-probabilities at a time.
SLICE = 2**26


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after a context; together at most one more than the model's length."""

    context: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return (*self.context, *self.targets)[:-1]


@dataclass
class Counts:
    """What scoring took.

    Attributes:
        asked: tokens of all requests.
        distinct: of these, each prefix counted once.
        planned: tokens that were to be computed; more than `distinct` where a forward would have cost more.
        computed: tokens that caches took in.
        forwards: of the model.
        logits: columns that logits were computed after, padding included.
    """

    asked: int = 0
    distinct: int = 0
    planned: int = 0
    computed: int = 0
    forwards: int = 0
    logits: int = 0

    def add(self, other: Counts) -> None:
        """Count these too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class _Found:
    """Of one forward: log-probabilities, whether each target is the likeliest, and whose they are."""

    values: Tensor
    likeliest: Tensor
    owners: list[tuple[int, int]]


@dataclass
class PrefixScorer:
    """Scores continuations with a patched model.

    Args:
        model: patched.
        softmax_dtype: of the log-softmax; that of the logits by default.
        most_tokens: of one forward; a longer row runs alone.
        worth: tokens that a forward of its own has to save.
        levels: forwards that follow on each other, at most.
        counts: of all that was scored.
        on_scored: called with how many more requests are under way.
    """

    model: Any
    softmax_dtype: torch.dtype | None = None
    most_tokens: int = AUTO_TOKENS
    worth: int | None = None
    levels: int = MOST_LEVELS
    counts: Counts = field(default_factory=Counts)
    on_scored: Callable[[int], None] | None = None

    def score(self, asked: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """Of each the sum of its tokens' log-probabilities, and whether each is the likeliest.

        Raises:
            CacheFullError, torch.OutOfMemoryError: memory does not suffice for the longest row; no page is held.
        """
        if not asked:
            return []
        numbers: dict[tuple[int, ...], int] = {}
        sequence_of = [numbers.setdefault(one.read, len(numbers)) for one in asked]
        sequences = [np.array(read, np.int64) for read in numbers]
        scored = [0] * len(sequences)
        for number, one in zip(sequence_of, asked, strict=True):
            scored[number] = max(scored[number], len(one.targets))
        on_cpu = self.model.device.type == "cpu"
        worth = (WORTH_CPU if on_cpu else WORTH_GPU) if self.worth is None else self.worth
        tree = PrefixTree(sequences, scored, worth, self.levels)
        run = _Run(self, sequences, _asked_of(tree, asked, sequence_of))
        run.counts.asked = sum(len(one.read) for one in asked)
        run.counts.distinct, run.counts.planned = tree.distinct, tree.tokens
        try:
            self._make_room(tree)
            run.descend(None, [(0, root) for root in tree.roots])
        finally:
            self.counts.add(run.counts)
        return _sums(run.found, asked)

    def _make_room(self, tree: PrefixTree) -> None:
        """Pages for the rows that are there at the same time, so that they need not move."""
        model = find_model(self.model)
        groups = model._fastattn.runtime.groups_for(model)
        longest = max(node.last for root in tree.roots for node in root.walk())
        pages = -(-(min(tree.tokens, 2 * self.most_tokens) + longest) // groups.page_size)
        for group in groups:
            (groups.turn.take(PATIENCE), group.ensure(pages) if groups.turn.is_mine() else None)


class _Run:
    """One scoring under way."""

    def __init__(
        self, scorer: PrefixScorer, sequences: Sequence[Any], wanted: dict[int, list[tuple[int, int, int, int]]]
    ) -> None:
        self.scorer, self.sequences, self.wanted = scorer, sequences, wanted
        self.counts = Counts()
        self.found: list[_Found] = []

    def descend(self, past: PagedCache | None, nodes: Sequence[tuple[int, Node]]) -> None:
        """Compute nodes, each after a row of `past`, and all that is below them."""
        for part in self._parts(nodes):
            cache = (
                PagedCache(find_model(self.scorer.model).config) if past is None else fork(past, [row for row, _ in part])
            )
            try:
                self._forward(cache, [node for _, node in part])
                below = [(place, child) for place, (_, node) in enumerate(part) for child in node.children]
                if below:
                    self.descend(cache, below)
            finally:
                cache.reset()

    def _parts(self, nodes: Sequence[tuple[int, Node]]) -> Iterator[list[tuple[int, Node]]]:
        """Nodes of one forward each: of like length, so that few columns are padding, and with logits that fit."""
        vocabulary = find_model(self.scorer.model).config.get_text_config(decoder=True).vocab_size
        part: list[tuple[int, Node]] = []
        most = columns = 0
        for row, node in sorted(nodes, key=lambda entry: (entry[1].last - entry[1].wanted, entry[1].count)):
            most, columns = max(most, node.count), max(columns, node.last - node.wanted, 1)
            rows = len(part) + 1
            if part and (rows * most > self.scorer.most_tokens or rows * columns * vocabulary > MOST_LOGITS):
                yield part
                part, most, columns = [], node.count, max(node.last - node.wanted, 1)
            part.append((row, node))
        if part:
            yield part

    def _forward(self, cache: PagedCache, nodes: Sequence[Node]) -> None:
        device = self.scorer.model.device
        width = max(node.count for node in nodes)
        keep = max(1, max(node.last - node.wanted for node in nodes))
        ids, mask = torch.zeros(2, len(nodes), width, dtype=torch.int64, device="cpu")
        for place, node in enumerate(nodes):
            ids[place, width - node.count :] = torch.from_numpy(self.sequences[node.sequence][node.first : node.last])
            mask[place, width - node.count :] = 1
        before = sum(cache.lengths)
        logits = append(self.scorer.model, cache, ids.to(device), mask.to(device), logits_to_keep=keep)
        self.counts.computed += sum(cache.lengths) - before
        self.counts.forwards += 1
        self.counts.logits += len(nodes) * keep
        self._note(logits, nodes)

    def _note(self, logits: Tensor, nodes: Sequence[Node]) -> None:
        """The log-probabilities of what was asked for after these nodes' tokens."""
        places: dict[tuple[int, int], int] = {}
        taken, targets, owners = [], [], []
        for row, node in enumerate(nodes):
            for position, target, number, offset in self.wanted.get(id(node), ()):
                column = logits.shape[1] - (node.last - position)
                taken.append(places.setdefault((row, column), len(places)))
                targets.append(target)
                owners.append((number, offset))
        if not owners:
            return
        # Sent at once: each copy to a device waits.
        rows, columns = torch.tensor(list(places), device="cpu").T.to(logits.device)
        which, wanted = torch.tensor([taken, targets], device="cpu").to(logits.device)
        size = max(SLICE // logits.shape[-1], 1)
        if len(places) <= size:
            self._take(logits[rows, columns], which, wanted, owners)
            return
        # A copy of all logits would be as large as they are.
        slices: list[list[int]] = [[] for _ in range(0, len(places), size)]
        for one, place in enumerate(taken):
            slices[place // size].append(one)
        for first, some in zip(range(0, len(places), size), slices, strict=True):
            picked = torch.tensor(some, device="cpu").to(logits.device)
            part = logits[rows[first : first + size], columns[first : first + size]]
            self._take(part, which[picked] - first, wanted[picked], [owners[one] for one in some])

    def _take(self, logits: Tensor, which: Tensor, wanted: Tensor, owners: list[tuple[int, int]]) -> None:
        logprobs = torch.log_softmax(logits, -1, dtype=self.scorer.softmax_dtype)
        self.found.append(_Found(logprobs[which, wanted], logprobs.argmax(-1)[which] == wanted, owners))
        if self.scorer.on_scored is not None:
            self.scorer.on_scored(sum(offset == 0 for _, offset in owners))


def _asked_of(
    tree: PrefixTree, asked: Sequence[Continuation], sequence_of: Sequence[int]
) -> dict[int, list[tuple[int, int, int, int]]]:
    """By node what is asked for after its tokens: `(position, target, request, its how-manieth)`."""
    wanted: dict[int, list[tuple[int, int, int, int]]] = {}
    for number, (one, sequence) in enumerate(zip(asked, sequence_of, strict=True)):
        count, last = len(one.targets), len(one.read)
        for node in tree.way_to(sequence):
            for position in range(max(node.first, last - count), min(node.last, last)):
                offset = position - (last - count)
                wanted.setdefault(id(node), []).append((position, one.targets[offset], number, offset))
            if node.first <= last - count:
                break
    return wanted


def _sums(found: Sequence[_Found], asked: Sequence[Continuation]) -> list[tuple[float, bool]]:
    """Sums in the dtype of the log-probabilities, as the harness makes them."""
    values = torch.cat([one.values for one in found]).cpu()
    likeliest = torch.cat([one.likeliest for one in found]).tolist()
    order: list[list[int]] = [[0] * len(one.targets) for one in asked]
    for place, (number, offset) in enumerate(owner for one in found for owner in one.owners):
        order[number][offset] = place
    return [(float(values[places].sum()), all(likeliest[place] for place in places)) for places in order]


def why_not_scored(model: Any) -> str | None:
    """Why a model's continuations cannot be scored on shared pages; None if they can."""
    try:
        target = find_model(model)
    except TypeError as error:
        return str(error)
    state = vars(target).get("_fastattn")
    if state is None:
        return "the model is not patched"
    if state.runtime.ranks is not None:
        return "the model is sharded over several processes"
    if any(getattr(one, "is_prompt_learning", False) for one in getattr(model, "peft_config", {}).values()):
        return "a trained prompt stands before every other"
    if target.config.get_text_config(decoder=True) is not target.config:
        return "the model has towers, whose input gives tokens other positions"
    cache = PagedCache(target.config)
    if set(cache.tables) != {None}:
        return "a sliding window counts the columns that rows are padded by"
    if any(layer not in cache.paged_layers for layer in cache.layers):
        return "linear-attention layers keep a state"
    return why_not_model(target, target.generation_config)


OUT_OF_MEMORY = (CacheFullError, torch.OutOfMemoryError)
