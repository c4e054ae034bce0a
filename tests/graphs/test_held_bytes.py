"""Bytes that an object holds are those of its tensors, wherever they lie in it."""

from __future__ import annotations

import torch

from hf_fastattn.graphs.held_bytes import held_bytes
from hf_fastattn.loop.device_state import DeviceState

CPU = torch.device("cpu")


def test_views_count_once_and_other_devices_not() -> None:
    table = torch.zeros(4, 8)
    assert held_bytes({"a": [table, table[1:]], "b": (table.T, torch.zeros(9, device="meta"))}, CPU) == table.nbytes


def test_what_a_loop_holds() -> None:
    """The tensors that a step works on lie deeper than in attributes, and so do those of processors."""
    state = DeviceState(CPU, 4, 8, (None,), 64)
    direct = sum(value.nbytes for value in vars(state).values() if isinstance(value, torch.Tensor))
    before = held_bytes(state, CPU)
    assert before >= direct + state._all.tables.nbytes + state._all.tokens.nbytes
    state.seen(4)
    assert held_bytes(state, CPU) == before + state._seen.untyped_storage().nbytes()
