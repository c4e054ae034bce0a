"""Teacher forcing in pieces, so that every path over pages works: prefill, appends of several tokens, decode.

One forward over a whole window would never read a page that an earlier forward wrote. Here the first part of each row
is a prefill, the next tokens come a few at a time, and the last ones one by one. All rows of a batch go together,
padded on the left to different lengths. The pages of a patched model are taken as the rows grow, so that those of
several rows lie between each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache

import hf_fastattn
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.eval.accuracy.windows import WindowBatch
from hf_fastattn.patching import find_model
from hf_fastattn.transformers_version import CACHE

# What of the counters of calls says which path ran.
COUNTED = ("forwards", "fast_loops", "graphs_captured", "graphs_replayed", "pages_shared", "tokens_reused")
BY_REASON = ("fallbacks", "not_looped", "uncaptured", "prefix_unused")


@dataclass(frozen=True)
class Schedule:
    """How a row is fed: at its end `decode` single tokens, before them `appended` tokens in pieces of `piece`."""

    appended: int = 40
    piece: int = 13
    decode: int = 32

    def pieces(self, columns: int, shortest: int) -> list[tuple[int, int]]:
        """`(first, last)` columns of each forward before decode; every row has a token in the first one."""
        tail = min(self.appended + self.decode, shortest - 1)
        decode = min(self.decode, tail)
        bounds = [0, *range(columns - tail, columns - decode, self.piece), columns - decode]
        return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


@dataclass(frozen=True)
class Piece:
    """The logits `[B, last - first, V]` of columns `first .. last - 1`, of which the earliest may have been left out."""

    phase: str
    first: int
    last: int
    logits: Tensor


class Forced(LogitsProcessor):
    """Notes the raw logits of each step, and leaves only the token that is to follow.

    Args:
        targets: `[B, steps]` tokens to force.
        rows: which rows to note.
    """

    def __init__(self, targets: Tensor, rows: slice) -> None:
        self.targets = targets
        self.rows = rows
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logits)
        self.logits.append(scores[self.rows].clone())
        return torch.full_like(scores, float("-inf")).scatter(1, self.targets[:, step : step + 1], 0.0)


class CallLog:
    """The counters of a patched model over several forwards and calls of `generate()`, each of which starts new ones."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._calls = [hf_fastattn.report(model).last_call]
        self._steps: set[tuple[int, int]] = set()

    def look(self) -> None:
        """Note the counters in force and the steps that are recorded; to be called after each `generate()`."""
        call = hf_fastattn.report(self.model).last_call
        if all(call is not known for known in self._calls):
            self._calls.append(call)
        # They are dropped where a later call has more rows whose states they would have to read.
        recorded = find_model(self.model)._fastattn.runtime.loop_graphs.recorded
        self._steps.update((key.rows, key.sharers) for key in recorded)

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pass pieces on, and look after each."""
        for piece in pieces:
            self.look()
            yield piece

    def record(self) -> dict[str, Any]:
        """Which path ran: paged forwards, loops of the device and their graphs, by reason what ran otherwise.

        `steps` are the recorded ones, as rows and the greatest number of them that read a prefix once; `shares` is whether
        any may, `keeps` whether pages of prompts stay for later ones.
        """
        self.look()
        calls = [call for call in self._calls if call]
        found: dict[str, Any] = {name: sum(getattr(call, name) for call in calls) for name in COUNTED}
        for name in BY_REASON:
            reasons: Counter[str] = Counter()
            for call in calls:
                reasons.update(getattr(call, name))
            found[name] = dict(reasons)
        report, runtime = hf_fastattn.report(self.model), find_model(self.model)._fastattn.runtime
        # Layers with windows, and rows that must not depend on each other, read prefixes for themselves.
        shares = not runtime.config.batch_invariant and any(group.window is None for group in runtime.groups)
        held = {"backend": report.backend, "steps": [list(step) for step in sorted(self._steps)]}
        return {**found, **held, "shares": shares, "keeps": runtime.config.prefix_cache}


def is_patched(model: Any) -> bool:
    """Whether `hf_fastattn.patch` is in force."""
    return hasattr(find_model(model), "_fastattn")


def new_cache(model: Any) -> Any:
    """The cache that the model's `generate()` would use; ours from the model's own pages, without room to grow in."""
    if not is_patched(model):
        return DynamicCache(config=model.config)
    runtime = find_model(model)._fastattn.runtime
    return PagedCache(model.config, groups=runtime.groups, counters=runtime.counters)


@torch.no_grad()
def whole(model: Any, batch: WindowBatch, keep: int, cached: bool = False) -> Tensor:
    """Logits `[B, keep, V]` of the last columns, from one forward, without a cache if none is asked for."""
    device = model.device
    arguments = {"attention_mask": batch.mask.long().to(device), "position_ids": batch.positions.to(device)}
    if cached:
        arguments[CACHE] = DynamicCache(config=model.config)
    return model(batch.ids.to(device), **arguments, use_cache=cached, logits_to_keep=keep).logits


@torch.no_grad()
def in_pieces(
    model: Any, batch: WindowBatch, schedule: Schedule, *, keep: int, share: bool = False, generate: bool = True
) -> Iterator[Piece]:
    """Feed a batch and yield the logits of at least its last `keep` columns.

    Args:
        model: stock or patched.
        batch: the rows.
        schedule: where they are cut.
        keep: columns wanted.
        share: after the prefill each row gets a copy that shares its pages and goes on with other tokens; the copies'
            logits are not wanted. What a copy writes must not be seen by its row.
        generate: decode inside `generate()`, as users do; else by forwards, where hooks on modules see each token.
    """
    device, cache = model.device, new_cache(model)
    ids, mask, positions = batch.ids.to(device), batch.mask.to(device), batch.positions.to(device)
    pieces = schedule.pieces(ids.shape[1], batch.shortest)
    split, done = pieces[0][1], pieces[-1][1]
    rows = slice(None)
    try:
        yield _forward(model, cache, ids, mask, positions, pieces[0], "prefill", rows, keep)
        if share:
            cache.batch_repeat_interleave(2)
            ids, mask, positions = (table.repeat_interleave(2, 0) for table in (ids, mask, positions))
            # The copies read other tokens from here on: their row's, one place late.
            ids[1::2, split:] = ids[1::2, split:].roll(1, 1)
            rows = slice(None, None, 2)
        for piece in pieces[1:]:
            yield _forward(model, cache, ids, mask, positions, piece, "append", rows, keep)
        if not generate:
            for column in range(done, ids.shape[1]):
                yield _forward(model, cache, ids, mask, positions, (column, column + 1), "decode", rows, keep)
        elif done < ids.shape[1]:
            yield _generated(model, cache, ids, mask, done, rows)
    finally:
        if isinstance(cache, PagedCache):
            cache.reset()


def _forward(
    model: Any,
    cache: Any,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    piece: tuple[int, int],
    phase: str,
    rows: slice,
    keep: int,
) -> Piece:
    first, last = piece
    wanted = min(last - first, max(last - (ids.shape[1] - keep), 1))
    logits = model(
        ids[:, first:last],
        attention_mask=mask[:, :last].long(),
        position_ids=positions[:, first:last],
        **{CACHE: cache},
        use_cache=True,
        logits_to_keep=wanted,
    ).logits
    return Piece(phase, last - wanted, last, logits[rows])


def _generated(model: Any, cache: Any, ids: Tensor, mask: Tensor, done: int, rows: slice) -> Piece:
    steps = ids.shape[1] - done
    forced = Forced(torch.cat((ids[:, done + 1 :], ids[:, :1]), 1), rows)
    model.generate(
        ids[:, : done + 1],
        attention_mask=mask[:, : done + 1].long(),
        **{CACHE: cache},
        max_new_tokens=steps,
        logits_processor=LogitsProcessorList([forced]),
    )
    return Piece("decode", done, done + steps, torch.stack(forced.logits, 1))
