"""A piece of one prompt by way of `ForwardGraphs`: beside running rows its launches would take longer than its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.batching.slot_pages import SlotPages
from hf_fastattn.cache.batch import Batch
from hf_fastattn.cache.batch_tensors import HostBatch
from hf_fastattn.cache.by_window import ByWindow
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.recurrent_layer import RecurrentLayer
from hf_fastattn.pages.page_groups import PageGroups
from hf_fastattn.pages.table_mirror import TableMirror
from hf_fastattn.patches.fused.forward import fused_forward

# Tokens of a prompt that its recorded piece has page tables for, at least.
ROOM = 16_384


class _Row:
    """The pages of one slot, as static inputs take them."""

    def __init__(self, pages: Sequence[int]) -> None:
        self._pages = pages

    def as_array(self) -> tuple[NDArray[np.int32], int]:
        mirror = TableMirror()
        mirror.add_rows(1)
        return mirror.update([self._pages]), mirror.version


@dataclass
class _OneSlot:
    """What `ForwardGraphs` asks of a cache, about one slot of the running batch."""

    cache: PagedCache
    tables: dict[int | None, _Row]
    room: int

    @property
    def groups(self) -> PageGroups:
        return self.cache.groups

    @property
    def lengths(self) -> list[int]:
        return self.cache.lengths

    @property
    def recurrent_layers(self) -> dict[int, RecurrentLayer]:
        return self.cache.recurrent_layers

    @property
    def paged_batch(self) -> Batch | None:
        return self.cache.paged_batch

    def using(self, batch: Batch, *on: Any) -> Any:
        return self.cache.using(batch, *on)

    def grow_tensors(self) -> None:
        self.cache.grow_tensors()

    def get_seq_length(self) -> int:
        return 0


def recorded_piece(
    model: Any, pages: SlotPages, slot: int, before: int, piece: NDArray[np.int64], size: int, device: torch.device
) -> Tensor | None:
    """The last hidden states `[1, size, hidden]` of a piece of at most `size` tokens, filled up with tokens of no row.

    None where forwards are not recorded.
    """
    runtime, cache, count = model._fastattn.runtime, pages.cache, len(piece)
    decoder = model._fastattn.decoder(model)
    host = pages.batch([slot], [before], [count]).known

    def places(window: int | None) -> Any:
        return np.concatenate((host.slots[window], np.full(size - count, -1)))

    filled = HostBatch(host.query_lens, host.seq_lens, host.plans, ByWindow(cache.tables, places))
    batch = Batch(1, size, count, False, pages.options, filled)
    tokens = np.zeros((2, size), np.int64)
    tokens[0, :count], tokens[1, :count] = piece, np.arange(before, before + count)
    packed = torch.from_numpy(tokens).to(device, non_blocking=True)
    arguments = {"input_ids": packed[:1], "inputs_embeds": None, "position_ids": packed[1:], "attention_mask": None}
    rows = {window: _Row(table.rows[slot]) for window, table in cache.tables.items()}
    view: Any = _OneSlot(cache, rows, max(before + count, ROOM))

    def forward(decoder: Any, _: Any, **given: Any) -> Any:
        return fused_forward(decoder, cache, **given)

    cache.grow_tensors()
    with cache.using(batch):
        outputs = runtime.graphs.run(decoder, arguments, view, {}, forward, pages.counters)
    return None if outputs is None else outputs.last_hidden_state
