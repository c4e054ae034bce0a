"""The work list made on the device against the same list made in Python."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.attention.work_list import work_list


def expected(counts: list[int], slots: int, packed: int, block_m: int) -> list[list[int]]:
    """(row, first packed query, slot): row after row, the last queries first, slots innermost."""
    tiles = []
    for row, count in enumerate(counts):
        for block in reversed(range(-(-count * packed // block_m))):
            tiles += [[row, block * block_m, slot] for slot in range(slots)]
    return tiles


def check(counts: list[int], slots: int, packed: int, block_m: int, device: str) -> None:
    begins = torch.tensor([0, *counts]).cumsum(0).to(device=device, dtype=torch.int32)
    work, count = work_list(begins, sum(counts), slots, packed, block_m)
    want = expected(counts, slots, packed, block_m)
    assert count.item() == len(want) <= len(work)
    assert work[: len(want), :3].tolist() == want


@pytest.mark.interpreter
@pytest.mark.parametrize("counts", [[1], [300], [0, 7, 0], [16, 17, 1, 0, 33], [1] * 20])
@pytest.mark.parametrize(("slots", "packed", "block_m"), [(2, 4, 16), (8, 1, 64), (5, 7, 128)])
def test_work_list(counts, slots, packed, block_m):
    check(counts, slots, packed, block_m, "cpu")


@pytest.mark.gpu
def test_work_list_on_the_gpu():
    for counts in ([1], [5000, 0, 129, 1], list(range(16))):
        check(counts, 8, 4, 128, "cuda")
