"""What kernels read of a batch, as named tensors on one device; and what the host knows of a batch that it made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fastattn.cache.by_window import ByWindow
from hf_fastattn.kernels.attention.read_plan import ReadPlan

# Bytes of pageable memory that a copy to a CUDA device stages at once.
STAGED = 64 * 1024


@dataclass(frozen=True)
class BatchTensors:
    """The tensors of a batch on a device, for all layers.

    Attributes:
        slots: by window, `[T]` int64 or int32: `page * P + offset` of every new token; -1 writes nowhere.
        page_tables: by window, `[B, columns]` int32 pages of the rows, arbitrary past their end.
        seq_lens: `[B]` int32 keys a row after the append.
        cu_seqlens: `[B + 1]` int32, where each row's queries begin; None in decode, where every row has one.
    """

    slots: Mapping[int | None, Tensor]
    page_tables: Mapping[int | None, Tensor]
    seq_lens: Tensor
    cu_seqlens: Tensor | None = None


@dataclass(frozen=True)
class HostBatch:
    """The rows of a batch as the host knows them.

    Attributes:
        query_lens: new tokens a row that are stored.
        seq_lens: tokens a row after the append.
        plans: by window, what the reference reads.
        slots: by window, the slots of all new tokens, row after row.
        tables: by window, `[B, columns]` int32 pages of the rows, arbitrary past their end; changed in place later. Without
            it, those of the plans are taken.
    """

    query_lens: list[int]
    seq_lens: list[int]
    plans: Mapping[int | None, ReadPlan]
    slots: Mapping[int | None, NDArray[np.int64]]
    tables: Mapping[int | None, NDArray[np.int32]] | None = None

    def on(self, device: torch.device) -> BatchTensors:
        """These numbers on a device; tables and slots of a window when they are first asked for."""
        decode = all(length == 1 for length in self.query_lens)
        return BatchTensors(
            slots=ByWindow(self.plans, lambda window: _upload(self.slots[window], torch.int64, device)),
            page_tables=ByWindow(self.plans, lambda window: _upload_table(self._table(window), device)),
            seq_lens=_upload(self.seq_lens, torch.int32, device),
            cu_seqlens=None if decode else _upload([0, *accumulate(self.query_lens)], torch.int32, device),
        )

    def _table(self, window: int | None) -> NDArray[np.int32]:
        if self.tables is not None:
            return self.tables[window]
        rows = self.plans[window].pages
        found = np.full((len(rows), max(map(len, rows))), -1, np.int32)
        for own, pages in zip(found, rows, strict=True):
            own[: len(pages)] = pages
        return found


def _upload_table(pages: NDArray[np.int32], device: torch.device) -> Tensor:
    host = torch.from_numpy(pages.copy())
    if device.type == "cuda" and host.nbytes > STAGED:
        # More than that would be copied when the device has done all that was launched before.
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    # From pageable memory this returns once the data is staged, without waiting for the device.
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
