"""Random programs on pages and states of hybrids together, steps recorded: every row is what it would be computed anew.

FASTATTN_HYBRID_PROGRAMS sets how many there are. On the CPU nothing is recorded: steps run again over their static tensors.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from hf_fastattn import PagedCache
from hf_fastattn.cache.forward_cache import ForwardCache
from hf_fastattn.cache.forward_states import ForwardStates
from hf_fastattn.transformers_version import CACHE
from tests.tools.models import VOCAB, pair_with_graphs
from tests.tools.reexecuted import reexecuted_loop

PROGRAMS = int(os.environ.get("FASTATTN_HYBRID_PROGRAMS", "16"))
MOVES = 10
NAMES = (
    "begin", "release", "tokens", "step", "step", "step", "select", "fork", "copy", "record", "crop", "crop", "generate",
    "loop", "stop",
)  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


class Stopped(BaseException):
    """Ends a forward, as Ctrl-C would."""


@dataclass
class Rows:
    """A cache, and what its rows have seen."""

    cache: PagedCache
    said: list[list[int]]
    pads: list[int] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        return torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(self.pads, self.said, strict=True)])

    @property
    def ids(self) -> Tensor:
        return torch.tensor([[0] * pad + row for pad, row in zip(self.pads, self.said, strict=True)])

    def select(self, rows: list[int]) -> None:
        self.said, self.pads = [list(self.said[row]) for row in rows], [self.pads[row] for row in rows]


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[Any, Any]]:
    with reexecuted_loop():
        # Qwen3.5 adds what it remembers of the rows of an earlier forward to positions.
        yield pair_with_graphs("qwen3_next", {"page_size": 4}, **SMALL)


def spoil_free_places(model: Any, programs: list[Rows]) -> None:
    """NaN in all places for states that no cache holds; pages that nobody holds have it already."""
    held: set[int] = set()
    for rows in programs:
        fields = [vars(layer) for layer in rows.cache.recurrent_layers.values()]
        # What a forward that failed is taken back to counts too.
        for one in (*fields, *(before for _, before in rows.cache._snapshots)):
            held.update(one[name][0].data_ptr() for name in ("conv_states", "recurrent_states") if one[name][0] is not None)
    runtime = model._fastattn.runtime
    if runtime.loop_graphs.row_states is not None:
        for tensors in runtime.loop_graphs.row_states._layers.values():
            for tensor in tensors:
                tensor.fill_(math.nan)
    states: ForwardStates | None = runtime.graphs._states
    for tensors in states._layers.values() if states is not None else ():
        for tensor in tensors:
            for half in tensor.chunk(2):
                if half.data_ptr() not in held:
                    half.fill_(math.nan)


class Program:
    """Moves chosen at random, on up to three caches over the pages of one model."""

    def __init__(self, seed: int, stock: Any, model: Any) -> None:
        self.chance, self.stock, self.model = random.Random(seed), stock, model
        self.open: list[Rows] = []
        self.moves: list[str] = []

    def run(self) -> None:
        self.begin()
        for _ in range(MOVES):
            spoil_free_places(self.model, self.open)
            move = self.chance.choice(NAMES)
            if move == "begin" or not self.open:
                self.begin()
                continue
            rows = self.chance.choice(self.open)
            self.moves.append(move)
            getattr(self, move)(rows)
            assert rows.cache.get_seq_length() == 0 or rows.cache.lengths == [len(row) for row in rows.said], self.moves
        for rows in self.open:
            self.forward(rows, 1)

    def new_tokens(self, rows: Rows, count: int) -> None:
        rows.said = [[*row, *(self.chance.randrange(1, VOCAB) for _ in range(count))] for row in rows.said]

    def given(self, rows: Rows, count: int) -> dict[str, Tensor]:
        mask = rows.mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]
        return {"input_ids": rows.ids[:, -count:], "attention_mask": mask, "position_ids": positions}

    def forward(self, rows: Rows, count: int) -> None:
        self.new_tokens(rows, count)
        ours = self.model(**self.given(rows, count), **{CACHE: rows.cache}).logits[:, -1]
        theirs = self.stock(**self.given(rows, rows.ids.shape[1])).logits[:, -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=lambda text: f"{self.moves}: {text}")

    def begin(self) -> None:
        if len(self.open) == 3:
            return
        self.moves.append("begin")
        lengths = [self.chance.randrange(1, 20) for _ in range(self.chance.randrange(1, 4))]
        rows = Rows(PagedCache(self.model.config), [[] for _ in lengths])
        rows.said = [[self.chance.randrange(1, VOCAB) for _ in range(length - 1)] for length in lengths]
        if self.chance.random() < 0.2:
            rows.cache.activate_past_recording()
        rows.pads = [max(lengths) - length for length in lengths]
        self.open.append(rows)
        self.forward(rows, 1) if max(lengths) == 1 else self.prompt(rows)

    def prompt(self, rows: Rows) -> None:
        self.new_tokens(rows, 1)
        given = self.given(rows, rows.ids.shape[1])
        ours, theirs = self.model(**given, **{CACHE: rows.cache}).logits[:, -1], self.stock(**given).logits[:, -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    def tokens(self, rows: Rows) -> None:
        self.forward(rows, self.chance.randrange(2, 12))

    def step(self, rows: Rows) -> None:
        self.forward(rows, 1)

    def select(self, rows: Rows) -> None:
        chosen = [self.chance.randrange(len(rows.said)) for _ in range(self.chance.randrange(1, len(rows.said) + 1))]
        rows.cache.batch_select_indices(torch.tensor(chosen))
        rows.select(chosen)

    def fork(self, rows: Rows) -> None:
        chosen = [self.chance.randrange(len(rows.said)) for _ in range(min(len(rows.said) + 1, 4))]
        rows.cache.reorder_cache(torch.tensor(chosen))
        rows.select(chosen)

    def copy(self, rows: Rows) -> None:
        if len(self.open) < 3:
            self.open.append(Rows(copy.deepcopy(rows.cache), [list(row) for row in rows.said], list(rows.pads)))

    def release(self, rows: Rows) -> None:
        self.open.remove(rows)
        if self.chance.random() < 0.5:
            rows.cache.reset()

    def generate(self, rows: Rows, **options: Any) -> None:
        self.new_tokens(rows, 1)
        call = {"max_new_tokens": 4, "do_sample": False, "attention_mask": rows.mask, "pad_token_id": 0, **options}
        said = self.model.generate(rows.ids, **call, **{CACHE: rows.cache})
        assert torch.equal(said, self.stock.generate(rows.ids, **call)), self.moves
        # The cache has not seen the last one.
        rows.said = [row[pad:-1] for pad, row in zip(rows.pads, said.tolist(), strict=True)]

    def loop(self, rows: Rows) -> None:
        """Generated in Transformers' own loop."""
        self.generate(rows, logits_processor=LogitsProcessorList([lambda ids, scores: scores.roll(1, 1)]))
        call = self.model._fastattn.runtime.counters
        assert call.not_looped and (call.uncaptured if rows.cache.records_states else call.graphs_replayed)

    def record(self, rows: Rows) -> None:
        rows.cache.activate_past_recording()

    def crop(self, rows: Rows) -> None:
        """Back to the state before one of the last tokens, if it is there."""
        rows.cache._settle()
        reach, least = min(layer.reach for layer in rows.cache.recurrent_layers.values()), min(map(len, rows.said))
        if reach < least - 1:
            with pytest.raises(RuntimeError, match=f"reach back by {reach}"):
                rows.cache.crop(-reach - 1)
        back = self.chance.randrange(min(reach, least - 1) + 1)
        rows.cache.crop(-back)
        rows.said = [row[: len(row) - back] for row in rows.said]

    def stop(self, rows: Rows) -> None:
        """A step that fails, at the latest when its token is noted, leaves the cache as it was."""
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            owner, name = self.chance.choice(((ForwardCache, "commit"), (ForwardStates, "written"), (ForwardStates, "take")))

            def stopped(*args: Any, **kwargs: Any) -> None:
                raise Stopped

            patch.setattr(owner, name, stopped)
            if owner is ForwardStates:
                # Until the step is one that is recorded.
                for _ in range(4):
                    self.forward(rows, 1)
                raise Stopped
            said = [list(row) for row in rows.said]
            try:
                self.forward(rows, 1)
            finally:
                rows.said = said
        if rows.cache.lengths != [len(row) for row in rows.said]:
            rows.said = [row[:length] for row, length in zip(rows.said, rows.cache.lengths, strict=True)]


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_programs(models: tuple[Any, Any], seed: int) -> None:
    stock, model = models
    program = Program(seed, stock, model)
    with torch.inference_mode() if seed % 3 == 0 else torch.no_grad():
        program.run()
    groups = model._fastattn.runtime.groups
    program.open.clear()
    gc.collect()
    groups.settle()
    assert groups.pages_in_use == 0 and all(group.pool.in_use == 0 for group in groups)
