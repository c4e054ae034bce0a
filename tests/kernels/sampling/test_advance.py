"""The end of a decode step: what the kernel writes is what PyTorch writes, to the bit, over several steps."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.sampling import advance_reference
from hf_fastattn.kernels.sampling.advance import advance
from hf_fastattn.kernels.sampling.loop_tensors import ABSENT, FINISHED_BIT, MOST_ENDS, MOST_ROWS, LoopTensors

VOCAB = 50
COLUMNS = 5
STEPS = 6
# Rows and columns of the tables that no step may touch, and how many more the slots have.
SPARE = 3
BY_ROW = ("chosen", "packed", "tokens", "positions", "finished", "limits", "seq_lens", "seen")


def first(state: LoopTensors, rows: int) -> LoopTensors:
    """Views of the first `rows` rows, as a step of a bucket gets them."""
    views = {name: getattr(state, name)[:rows] for name in BY_ROW if getattr(state, name) is not None}
    return replace(state, **views)


def random_state(rows: int, windows: int, page: int, *, drop: bool, seen: bool, device: str, seed: int = 0) -> LoopTensors:
    """A call half-way, with room for SPARE more rows: rows that go on, have finished, are absent, or are about to end."""
    generator = torch.Generator().manual_seed(seed)
    room = rows + SPARE

    def numbers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(device, dtype)

    finished = torch.tensor([0, 0, 0, 0, 1, ABSENT], dtype=torch.int32, device=device)[numbers(0, 6, room).long()]
    lengths = numbers(0, COLUMNS * page - STEPS, room)
    ends = torch.full((MOST_ENDS,), -1, device=device)
    ends[[0, 1, MOST_ENDS - 1]] = torch.tensor([3, 17, 40], device=device)
    step = numbers(0, 4, 1)
    return LoopTensors(
        chosen=numbers(0, VOCAB, room, dtype=torch.int64),
        packed=numbers(0, VOCAB, room, dtype=torch.int64),
        tokens=numbers(0, VOCAB, room, 1, dtype=torch.int64),
        positions=numbers(0, 99, room, 1, dtype=torch.int64),
        finished=finished,
        limits=step + numbers(1, 2 * STEPS, room),
        seq_lens=torch.where((finished == ABSENT) | (drop & (finished != 0)), 0, lengths),
        slots=numbers(-1, 99, windows, room),
        # Of windows whose first pages are released, too.
        tables=numbers(-1, 1 << 20, windows, room, COLUMNS),
        step=step,
        ends=ends,
        # Often an end token.
        pad=torch.tensor([3 if seed % 2 else 1], device=device),
        drop=torch.tensor([int(drop)], dtype=torch.int32, device=device),
        seen=numbers(0, 2, room, VOCAB, dtype=torch.uint8) if seen else None,
    )


def copied(state: LoopTensors) -> LoopTensors:
    held = {field.name: getattr(state, field.name) for field in fields(state)}
    return replace(state, **{name: value.clone() for name, value in held.items() if value is not None})


def assert_same(ours: LoopTensors, want: LoopTensors) -> None:
    for field in fields(want):
        left, right = getattr(ours, field.name), getattr(want, field.name)
        assert (left is None) == (right is None), field.name
        if right is not None:
            assert left.dtype == right.dtype and torch.equal(left, right), field.name


def check(rows: int, windows: int, page: int, *, drop: bool, seen: bool, device: str) -> None:
    state = random_state(rows, windows, page, drop=drop, seen=seen, device=device, seed=rows)
    want = copied(state)
    generator = torch.Generator().manual_seed(rows)
    for _ in range(STEPS):
        chosen = torch.randint(0, VOCAB, state.chosen.shape, generator=generator).to(device)
        for held in (state, want):
            held.chosen.copy_(chosen)
        advance(first(state, rows), page)
        advance_reference.advance(first(want, rows), page)
        assert_same(state, want)


def test_reference_of_one_step():
    """Rows that go on, choose an end token, reach their limit, have finished, and fill up the batch."""

    def column(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    def state(drop: int) -> LoopTensors:
        return LoopTensors(
            chosen=column(5, 3, 6, 7, 8, dtype=torch.int64),
            packed=column(0, 0, 0, 0, 0, dtype=torch.int64),
            tokens=column(0, 0, 0, 0, 0, dtype=torch.int64)[:, None],
            positions=column(6, 6, 6, 6, -1, dtype=torch.int64)[:, None],
            finished=column(0, 0, 0, 1, ABSENT),
            limits=column(9, 9, 2, 9, 0),
            seq_lens=column(7, 8, 9, 0 if drop else 10, 0),
            slots=torch.full((1, 6), 77, dtype=torch.int32),
            tables=column(*range(100, 118)).view(1, 6, 3),
            step=column(1),
            ends=torch.tensor([3] + [-1] * (MOST_ENDS - 1)),
            pad=torch.tensor([1]),
            drop=column(drop),
            seen=torch.zeros(5, 10, dtype=torch.uint8),
        )

    for drop in (0, 1):
        got = state(drop)
        advance_reference.advance(got, 4)
        assert got.tokens.flatten().tolist() == [5, 3, 6, 1, 1]
        assert got.finished.tolist() == [0, 1, 1, 1, ABSENT]
        assert [number >> FINISHED_BIT for number in got.packed.tolist()] == [0, 1, 1, 1, 1]
        assert [number % (1 << FINISHED_BIT) for number in got.packed.tolist()] == [5, 3, 6, 1, 1]
        assert got.positions.flatten().tolist() == [7, 7, 7, 7, 0]
        assert got.seq_lens.tolist() == ([8, 0, 0, 0, 0] if drop else [8, 9, 10, 11, 0])
        slots = [101 * 4 + 3, 105 * 4, 108 * 4 + 1, 111 * 4 + 2, -1]
        assert got.slots[0].tolist() == [*([slots[0], -1, -1, -1, -1] if drop else slots), 77]
        assert got.step.item() == 2
        assert got.seen is not None and got.seen.nonzero().tolist() == [[0, 5], [1, 3], [2, 6], [3, 1], [4, 1]]


@pytest.mark.interpreter
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize(("rows", "windows", "page"), [(1, 1, 16), (5, 2, 4), (33, 1, 4), (70, 2, 256)])
def test_advance(rows, windows, page, drop, seen):
    check(rows, windows, page, drop=drop, seen=seen, device="cpu")


@pytest.mark.interpreter
def test_tokens_outside_of_the_vocabulary_are_not_noted():
    """Nothing beside `seen` is written for a padding token that is none of the model's."""
    for pad in (-1, VOCAB):
        state = random_state(4, 1, 16, drop=False, seen=True, device="cpu")
        state.finished.fill_(1)
        state.pad.fill_(pad)
        before = copied(state)
        advance(first(state, 4), 16)
        assert (state.tokens[:4] == pad).all()
        assert state.seen is not None and before.seen is not None and torch.equal(state.seen, before.seen)


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    state = random_state(2, 1, 16, drop=False, seen=False, device="cpu")
    with pytest.raises(ValueError, match="ends"):
        advance(replace(state, ends=state.ends[:3]), 16)
    with pytest.raises(ValueError, match="chosen"):
        advance(replace(state, chosen=torch.zeros(MOST_ROWS + 1, dtype=torch.int64)), 16)


# As few specialisations as can hold every combination: the rest varies from one number of rows to the next.
@pytest.mark.gpu
@pytest.mark.parametrize(("windows", "page", "seen"), [(1, 16, False), (1, 16, True), (2, 4, True)])
def test_sweep(windows, page, seen):
    for rows in (*range(1, 71), 300):
        check(rows, windows, page, drop=rows % 2 == 0, seen=seen, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("drop", [False, True])
def test_replayed(drop):
    rows, page = 33, 16
    state = random_state(rows, 2, page, drop=drop, seen=True, device="cuda")
    want, views = copied(state), first(state, rows)
    # Compiles.
    advance(first(copied(state), rows), page)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(views, page)
    assert_same(state, want)
    for seed in range(STEPS):
        chosen = torch.randint(0, VOCAB, want.chosen.shape, generator=torch.Generator().manual_seed(seed)).to("cuda")
        for held in (state, want):
            held.chosen.copy_(chosen)
        graph.replay()
        advance_reference.advance(first(want, rows), page)
        assert_same(state, want)
