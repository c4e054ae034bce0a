"""Full rows make room: the kernel does what PyTorch does, to the bit, and a row's pages stay the same ones."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.sampling import slide_reference
from hf_fastattn.kernels.sampling.slide import slide

# Tokens a page, pages of sinks, pages that leave, pages of a full row, columns of the table.
SHAPES = [(4, 1, 2, 9, 12), (16, 0, 1, 1, 4), (1, 4, 16, 84, 128), (16, 2, 3, 70, 70)]
SPARE = 2


def check(shape: tuple[int, ...], device: str) -> None:
    page, sinks, leaving, pages, columns = shape
    full = page * pages
    lengths = torch.tensor([full, full - 1, 0, full, 1, full], dtype=torch.int32, device=device)
    rows = len(lengths)
    table = torch.randperm((rows + SPARE) * columns, device=device).int().view(rows + SPARE, columns)
    held, before = lengths.clone(), table.clone()
    want_lengths, want = lengths.clone(), table[:rows].clone()
    options = {"page_size": page, "sinks": sinks, "leaving": leaving, "pages": pages}
    slide(lengths, table[:rows], **options)
    slide_reference.slide(want_lengths, want, **options)
    assert torch.equal(lengths, want_lengths) and torch.equal(table[:rows], want)
    assert torch.equal(table[rows:], before[rows:]), "rows that take no part"
    for row in range(rows):
        slid = bool(held[row] == full)
        assert torch.equal(table[row, :sinks], before[row, :sinks]) and torch.equal(table[row, pages:], before[row, pages:])
        assert sorted(table[row].tolist()) == sorted(before[row].tolist())
        assert int(lengths[row]) == int(held[row]) - (leaving * page if slid else 0)
        if slid:
            assert torch.equal(table[row, sinks : pages - leaving], before[row, sinks + leaving : pages])
        else:
            assert torch.equal(table[row], before[row])


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorch(shape):
    check(shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled(shape):
    check(shape, "cuda")


def test_wrong_tables():
    with pytest.raises(ValueError, match="12 columns"):
        slide(torch.zeros(2).int(), torch.zeros(2, 12).int(), page_size=4, sinks=1, leaving=2, pages=13)
    with pytest.raises(ValueError, match="of which 9 leave"):
        slide(torch.zeros(2).int(), torch.zeros(2, 12).int(), page_size=4, sinks=1, leaving=9, pages=9)
