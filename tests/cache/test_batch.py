"""Which kernel a batch's attention goes to: shared prefixes only where no window hides them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fastattn.cache.batch import Batch, BatchOptions, SharedPrefixes
from hf_fastattn.cache.batch_tensors import BatchTensors


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("shares", [False, True])
def test_layers_with_a_window_read_their_own_pages(
    shares: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.zeros(2, dtype=torch.int32)
    shared = SharedPrefixes(torch.zeros(2, dtype=torch.int32), numbers[:1], 2) if shares else None
    tensors = BatchTensors({window: numbers}, {window: numbers[:, None]}, numbers)
    batch = Batch.static(tensors, 2, BatchOptions(), shared)
    taken: list[str] = []
    monkeypatch.setattr(Batch, "_backend_of", lambda self, q: "triton")
    for name in ("_attend_shared", "_attend_triton"):
        monkeypatch.setattr(Batch, name, lambda self, q, *args, _name=name: taken.append(_name))
    pages: Any = torch.zeros(1, 1, 1, 16)
    batch.attend(torch.zeros(2, 1, 16), pages, pages, window, scale=1.0)
    assert taken == ["_attend_shared" if shares and window is None else "_attend_triton"]


def test_a_static_batch_does_not_pretend_to_know_lengths() -> None:
    numbers = torch.zeros(3, dtype=torch.int32)
    batch = Batch.static(BatchTensors({None: numbers}, {None: numbers[:, None]}, numbers), 3, BatchOptions())
    assert batch.host is None and batch.rows == batch.tokens == 3 and batch.is_decode
    with pytest.raises(AssertionError):
        _ = batch.known
