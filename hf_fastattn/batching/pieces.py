"""Which tokens of prompts are computed next, and whether prompts may be computed little by little."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hf_fastattn.batching.requests import Request
from hf_fastattn.batching.running_batch import RunningBatch
from hf_fastattn.batching.slot_pages import SlotPages
from hf_fastattn.loop.piece_inputs import Pieces

# Requests, and how many tokens of the prompt of each.
Taken = list[tuple[Request, int]]


def next_tokens(prompts: Sequence[Request], tokens: int) -> Taken:
    """Whose `tokens` tokens are computed next, and how many of each."""
    taken = []
    for request in prompts:
        count = min(len(request.prompt) - request.done, tokens)
        taken.append((request, count))
        tokens -= count
        if not tokens:
            break
    return taken


def pieces_of(pages: SlotPages, taken: Taken) -> Pieces:
    """So many next tokens of each of these prompts, as a step takes them in."""
    slots, before = [request.slot for request, _ in taken], [request.done for request, _ in taken]
    after = [request.done + count for request, count in taken]
    tokens = [request.prompt[first:last] for (request, _), first, last in zip(taken, before, after, strict=True)]
    places = [pages.places(window, slots, before, after) for window in pages.cache.tables]
    params = np.array([request.params.values() for request, _ in taken])
    return Pieces(slots, before, tokens, places, [request.number for request, _ in taken], params)


def may_wait(batch: RunningBatch, tokens: int) -> bool:
    """Whether all requests end no later than the last row does, though so many `tokens` of prompts are computed a step."""
    rows, before = batch.rows, 0
    longest = int(rows.left[rows.slots].max())
    for request in batch.prompts:
        before += len(request.prompt) - request.done
        if request.state.streaming or before > (longest - request.limit) * tokens:
            return False
    return not batch.waiting
