"""`StepInputs`: what the layers of a decode step read on one device, in tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.cache.batch import Batch, BatchOptions, SharedPrefixes
from hf_fastattn.cache.batch_tensors import BatchTensors
from hf_fastattn.cache.prefix_groups import MOST_LEVELS, PrefixGroups
from hf_fastattn.graphs.upload_ring import UploadRing
from hf_fastattn.loop.graph_key import GraphKey


class StepInputs:
    """Tokens, positions, lengths and slots, which every step changes, in one tensor; page tables, which the host writes.

    Args:
        device: of the layers.
        rows: there is room for, a multiple of 2.
        columns: of the page tables.
        windows: attention windows of the model.

    Attributes:
        tokens: `[rows, 1]` int64.
        positions: `[rows, 1]` int64.
        seq_lens: `[rows]` int32, keys a row.
        slots: `[W, rows]` int32, where the next key of a row goes.
        by_row: `[3 + W, rows]` int32: whether a row has finished, its length, its number in the call, and its slots: side by
            side, so that a batch whose rows come and go writes them in one launch.
        tables: `[W, rows, columns]` int32 page tables.
    """

    def __init__(self, device: torch.device, rows: int, columns: int, windows: Sequence[int | None]) -> None:
        self.windows, self._columns, self._rows = tuple(windows), columns, rows
        count = len(self.windows)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Tensors made inside inference mode could not be written outside of it later.
        with torch.inference_mode(False):
            # Of each row two numbers of 64 bits, and those of 32 of `by_row`.
            self._changing = zeros(2 * rows + (3 + count) * rows // 2, dtype=torch.int64)
            self.tokens, self.positions = self._changing[:rows, None], self._changing[rows : 2 * rows, None]
            self.by_row = self._changing[2 * rows :].view(torch.int32).view(3 + count, rows)
            self.seq_lens, self.slots = self.by_row[1], self.by_row[3:]
            self.tables = zeros(count, rows, columns)
            # Of all levels, one after the other.
            self._group_starts, self._prefix_lens = zeros(MOST_LEVELS * (rows + 1)), zeros(MOST_LEVELS * rows)
            # Transformers passes a 4-D mask on as it is; our attention ignores it.
            self.mask = torch.zeros(1, 1, 1, 1, device=device)
            self._staging = UploadRing(count * rows * columns, device)

    def follow(self, other: StepInputs) -> None:
        """Hold what the inputs on another device hold, but for what the host writes; nobody waits on the host."""
        self._changing.copy_(other._changing, non_blocking=True)

    def batch(self, key: GraphKey, options: BatchOptions) -> Batch:
        """A batch of one new token a row whose tensors are these."""
        rows, shared, places = key.rows, None, range(len(self.windows))
        if key.sharers:
            levels, groups = key.levels, key.groups
            starts = self._group_starts[: levels * (groups + 1)].view(levels, groups + 1)
            lens = self._prefix_lens[: levels * groups].view(levels, groups)
            shared = SharedPrefixes(starts, lens, key.sharers)
        tensors = BatchTensors(
            slots=dict(zip(self.windows, (self.slots[place, :rows] for place in places), strict=True)),
            page_tables=dict(zip(self.windows, (self.tables[place, :rows] for place in places), strict=True)),
            seq_lens=self.seq_lens[:rows],
        )
        return Batch.static(tensors, rows, options, shared, key.short, settled=True)

    def write_tables(self, tables: Sequence[NDArray[np.int32]], target: Tensor) -> None:
        """Upload `[B, columns]` page tables by window to `target`, of the shape of `tables`."""
        host, used = self._staging.next(), 0
        for place, pages in enumerate(tables):
            rows, columns = pages.shape[0], min(pages.shape[1], self._columns)
            place_in_host = host[place * self._rows * self._columns :][: rows * self._columns]
            place_in_host.reshape(rows, self._columns)[:, :columns] = pages[:, :columns]
            used = (place * self._rows + rows) * self._columns
        self._staging.send(target.view(-1), used)

    def write_groups(self, key: GraphKey, shared: PrefixGroups) -> None:
        """Write the prefix groups of a step with sharers; unused entries become empty groups."""
        starts: list[int] = []
        lengths: list[int] = []
        for level_starts, level_lengths in shared.layout():
            empty = key.groups - len(level_lengths)
            starts += level_starts + [level_starts[-1]] * empty
            lengths += level_lengths + [0] * empty
        write(self._group_starts, starts)
        write(self._prefix_lens, lengths)


def write(target: Tensor, values: Sequence[float]) -> None:
    """Put values of the host in the first places of a tensor."""
    host = torch.tensor(values, dtype=target.dtype, device="cpu")
    # From pageable memory this returns once the data is staged, without waiting for the device.
    target[: len(values)].copy_(host, non_blocking=True)
