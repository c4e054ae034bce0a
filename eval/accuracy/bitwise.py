"""Attention of decode and of a whole forward on equal inputs, layer by layer: whether they are the same to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_fastattn.cache.batch import Batch, BatchOptions
from hf_fastattn.cache.batch_tensors import HostBatch
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.eval.accuracy.feed import new_cache
from hf_fastattn.eval.accuracy.windows import WindowBatch
from hf_fastattn.graphs.forward_graphs import ForwardGraphs
from hf_fastattn.kernels.attention.read_plan import ReadPlan
from hf_fastattn.kernels.rehearsal import is_under_way
from hf_fastattn.transformers_version import CACHE


@dataclass(frozen=True)
class _Call:
    """One layer's attention in a forward: queries `[T, H, D]`, pages, window and options, and what came of it."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    window: int | None
    options: dict[str, Any]
    out: Tensor


@torch.no_grad()
def layers_apart(model: Any, batch: WindowBatch, places: Sequence[int] = (-1, -2, -17)) -> list[float]:
    """The largest difference of each layer between its attention in one forward and as decode steps.

    The whole rows are one paged forward of the patched model. Then the queries of some of its tokens attend once more, each
    row as a decode step of one token over the same pages, read up to that token.

    Args:
        model: patched.
        batch: of rows longer than the places.
        places: which tokens, counted from the end of each row; of layers with a window the last one alone.

    Returns:
        A difference a layer, in the order of the layers; 0 where all are equal to the bit.
    """
    calls: list[_Call] = []
    attend = Batch.attend

    def noted(self: Batch, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None, **options: Any) -> Tensor:
        out = attend(self, q, k_pages, v_pages, window, **options)
        # A rehearsal computes nothing.
        if not is_under_way():
            calls.append(_Call(q.clone(), k_pages, v_pages, window, options, out.clone()))
        return out

    cache = new_cache(model)
    try:
        # A recorded forward that is replayed calls nothing.
        launched = mock.patch.object(ForwardGraphs, "run", lambda *given: None)
        with mock.patch.object(Batch, "attend", noted), launched:
            model(
                batch.ids.to(model.device),
                attention_mask=batch.mask.long().to(model.device),
                position_ids=batch.positions.to(model.device),
                **{CACHE: cache},
                use_cache=True,
                logits_to_keep=1,
            )
        if not calls:
            raise ValueError("no layer of the model attended over pages: it is not patched, or falls back")
        lengths = batch.mask.sum(1).tolist()
        found = []
        for call in calls:
            # Of a layer with a window only the pages that its last tokens see are still there.
            seen = places if call.window is None else (-1,)
            found.append(max(_apart(cache, call, lengths, place) for place in seen))
        return found
    finally:
        if isinstance(cache, PagedCache):
            cache.reset()


def _apart(cache: PagedCache, call: _Call, lengths: list[int], place: int) -> float:
    """The largest difference of one layer at one place of all rows."""
    seq_lens = [length + 1 + place for length in lengths]
    table, size = cache.tables[call.window], cache.groups.page_size
    pages = [row[: -(-length // size)] for row, length in zip(table.rows, seq_lens, strict=True)]
    plan = ReadPlan(pages, [1] * len(lengths), seq_lens, size, call.window)
    host = HostBatch([1] * len(lengths), seq_lens, {call.window: plan}, {})
    begin, rows = 0, []
    for length in lengths:
        rows.append(begin + length + place)
        begin += length
    index = torch.tensor(rows, device=call.q.device)
    groups = cache.groups
    step = Batch.from_host(host, BatchOptions(groups.backend, groups.batch_invariant, groups.workspaces))
    out = step.attend(call.q[index].contiguous(), call.k_pages, call.v_pages, call.window, **call.options)
    return float((out.float() - call.out[index].float()).abs().max())
