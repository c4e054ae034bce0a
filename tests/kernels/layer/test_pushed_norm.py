"""The sum over ranks, whose rows are pushed into each other's memory, with residual and norm: ranks of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.layer import reference
from hf_fastattn.kernels.layer.pushed_norm import pushed_norm, words_of
from tests.kernels.cases import assert_close
from tests.kernels.layer.test_norm import BF16, FP16, FP32, rows
from tests.kernels.layer.test_summed_norm import addresses

ROOM = 4


def in_words(part: Tensor, number: int) -> Tensor:
    """What a rank pushes of its rows in launch `number`: `[T, words]` int64."""
    held = part.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return held | number << 32


def check(tokens: int, hidden: int, dtype: torch.dtype, ranks: int, *, bias: bool = False, device: str = "cpu") -> None:
    """Two launches of each rank in a row, in whose inbox the others' rows are already."""
    residual = rows(tokens, hidden, dtype, device, 2)
    weight, added = rows(2, hidden, dtype, device, 3)
    words = words_of(hidden, dtype)
    # What was there before must not be taken for a row of these launches.
    inboxes = [torch.full((2, ranks, ROOM, words), 4 << 32 | 0x7FC07FC0, device=device) for _ in range(ranks)]
    late = torch.zeros(1, dtype=torch.int32, device=device)
    counts = [torch.full((tokens + 1,), 5, dtype=torch.int32, device=device) for _ in range(ranks)]
    for number in (6, 7):
        parts = [rows(tokens, hidden, dtype, device, 10 * number + rank) for rank in range(ranks)]
        for rank, part in enumerate(parts):
            for other, row in enumerate(parts):
                if other != rank:
                    inboxes[rank][number % 2, other, :tokens] = in_words(row, number)
            out, total = pushed_norm(
                part, addresses(inboxes), ROOM, counts[rank], late, rank, residual, weight, 1e-5,
                bias=added if bias else None, unit_offset=bool(rank),
            )  # fmt: skip
            summed = torch.stack([one.float() for one in parts]).sum(0).to(dtype)
            summed = (summed.float() + added.float()).to(dtype) if bias else summed
            plain, plain_total = reference.add_rms_norm(summed, residual, weight, 1e-5, unit_offset=bool(rank))
            exact = torch.stack([one.double() for one in parts]).sum(0) + (added.double() if bias else 0)
            assert_close("sum", total, plain_total, exact + residual.double())
            assert_close("norm", out, plain, reference.rms_norm(plain_total.double(), weight.double(), 1e-5, bool(rank)))
            # Every rank has this one's row, and nothing but it was written.
            for inbox in inboxes:
                assert torch.equal(inbox[number % 2, rank, :tokens], in_words(part, number))
                assert bool((inbox[number % 2, rank, tokens:] >> 32 == 4).all())
            inboxes[rank][number % 2].fill_(4 << 32 | 0x7FC07FC0)
            for inbox in inboxes:
                inbox[number % 2, rank, :tokens] = 4 << 32
    assert not late.any()
    for count in counts:
        assert bool((count[:tokens] == 7).all()) and count[-1] == 5


@pytest.mark.interpreter
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (3, 100)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_small(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check(tokens, hidden, dtype, 2)


@pytest.mark.interpreter
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_and_a_bias(ranks: int) -> None:
    check(2, 72, BF16, ranks, bias=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("number", [0, 2])
def test_a_rank_that_does_not_come(number: int) -> None:
    """Its place is empty, or has the row of another launch."""
    x = rows(2, 64, FP32, "cpu", 1)
    inbox = torch.zeros(2, 2, 2, 64, dtype=torch.int64)
    inbox[1, 1] = in_words(x, number)
    launches, late = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    # Kernels know the inboxes by their addresses alone: both must outlive the launch.
    inboxes = [inbox, inbox.clone()]
    pushed_norm(x, addresses(inboxes), 2, launches, late, 0, x, x[0], 1e-5, looks=3)
    assert late.all()
    assert torch.equal(inboxes[1][1, 0], in_words(x, 1))


@pytest.mark.interpreter
def test_one_word_that_is_late_is_waited_for() -> None:
    x = rows(1, 64, BF16, "cpu", 1)
    inbox = torch.zeros(2, 2, 1, 32, dtype=torch.int64)
    inbox[1, 1] = in_words(x, 1)
    inbox[1, 1, 0, 31] = 0
    launches, late = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    inboxes = [inbox, inbox.clone()]
    pushed_norm(x, addresses(inboxes), 1, launches, late, 0, x, x[0], 1e-5, looks=3)
    assert late.all()
    assert torch.equal(inboxes[1][1, 0], in_words(x, 1))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 4096), (4, 4096), (3, 5120), (2, 16384)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("ranks", [2, 4])
def test_sizes(tokens: int, hidden: int, dtype: torch.dtype, ranks: int) -> None:
    check(tokens, hidden, dtype, ranks, device="cuda")


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, one = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64)
    counts, late = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="launches"):
        pushed_norm(x, one, 2, counts[:1], late, 0, x, x[0], 1e-5)
    with pytest.raises(ValueError, match="room=1"):
        pushed_norm(x, one, 1, counts, late, 0, x, x[0], 1e-5)
    with pytest.raises(ValueError, match="rank=2"):
        pushed_norm(x, one, 2, counts, late, 2, x, x[0], 1e-5)
    with pytest.raises(ValueError, match="residual"):
        pushed_norm(x, one, 2, counts, late, 0, x[:1], x[0], 1e-5)
    with pytest.raises(ValueError, match="weight"):
        pushed_norm(x, one, 2, counts, late, 0, x, x[0, :32], 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        pushed_norm(x.T, one, 2, counts, late, 0, x, x[0], 1e-5)
    with pytest.raises(ValueError, match="even"):
        pushed_norm(x[:, :63].half().contiguous(), one, 2, counts, late, 0, x, x[0], 1e-5)
