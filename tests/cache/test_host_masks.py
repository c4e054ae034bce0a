"""Masks on the host by NumPy: as PyTorch's own operations, and never the memory of what was given."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.cache import host_masks


@pytest.mark.parametrize("columns", [0, 5])
def test_masks_beside_each_other_are_copies(columns: int) -> None:
    mask = torch.rand(3, 9) > 0.5
    before = mask.clone()
    made = host_masks.longer(mask[:, 2:], columns, True)
    assert torch.equal(made, torch.nn.functional.pad(mask[:, 2:], (0, columns), value=True))
    # A mask may be a user's, who goes on to write to it.
    mask.logical_not_()
    assert torch.equal(made[:, :7], before[:, 2:])


def test_columns_after_padding() -> None:
    assert host_masks.after_padding([0, 2, 3], 3).tolist() == [[False] * 3, [False, True, True], [True] * 3]


def test_comparisons() -> None:
    stored = torch.tensor([[False, True, True]])
    assert not host_masks.all_shown(stored) and host_masks.all_shown(stored[:, 1:])
    assert host_masks.shows_more(torch.ones_like(stored), stored) and not host_masks.shows_more(
        stored, torch.ones_like(stored)
    )
    assert host_masks.equal(stored, stored.clone()) and not host_masks.equal(stored, ~stored)
    assert not host_masks.equal(stored, stored.expand(2, 3))
