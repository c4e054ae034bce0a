"""Rows that go on as others: what they read afterwards is what their parents held, and nobody else writes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hf_fastattn.kernels.sampling import fork_reference
from hf_fastattn.kernels.sampling.fork import MOST_BEAMS, ForkTensors, copy_pages, fork

# Pages `[N, P, G, D]` whose words a page are no power of two.
HEADS, DIM = 3, 8
SPARE = 2


@dataclass
class Beams:
    """Rows over pages, and beside them what each row should hold, token by token."""

    state: ForkTensors
    pages: list[torch.Tensor]
    held: torch.Tensor

    @staticmethod
    def make(prompts: int, beams: int, windows: int, page: int, columns: int, device: str) -> Beams:
        rows = prompts * beams
        room = rows + SPARE
        own = torch.randperm(windows * room * columns).view(windows, room, columns).to(device, torch.int32)
        pages = [torch.zeros(own.numel(), page, HEADS, DIM, device=device) for _ in range(2 * windows)]
        places = [[tensor.data_ptr(), tensor[0].nbytes // 8, index // 2] for index, tensor in enumerate(pages)]
        state = ForkTensors(
            parents=torch.zeros(rows, dtype=torch.int64, device=device),
            tables=own.clone(),
            own=own,
            seq_lens=torch.zeros(room, dtype=torch.int32, device=device),
            live=torch.ones(1, dtype=torch.int32, device=device),
            moves=torch.zeros(windows, rows, 2, dtype=torch.int32, device=device),
            places=torch.tensor(places, device=device),
            pages=lambda: [(index // 2, tensor) for index, tensor in enumerate(pages)],
            beams=beams,
            page_size=page,
        )
        return Beams(state, pages, torch.zeros(rows, columns * page, device=device))

    def append(self, value: float) -> None:
        """Every row writes a token of its own."""
        state, size = self.state, self.state.page_size
        for row in range(len(self.held)):
            column, offset = divmod(int(state.seq_lens[row]), size)
            for window, pages in state.pages():
                pages[state.tables[window, row, column], offset] = value + row
            self.held[row, int(state.seq_lens[row])] = value + row
        state.seq_lens[: len(self.held)] += 1

    def go_on(self, parents: torch.Tensor, how: Any) -> None:
        self.state.parents.copy_(parents)
        how(self.state)
        self.held = self.held[parents]

    def assert_right(self) -> None:
        state, size = self.state, self.state.page_size
        for window, pages in state.pages():
            for row, tokens in enumerate(self.held):
                length = int(state.seq_lens[row])
                table = state.tables[window, row, : -(-length // size)].long()
                got = pages[table].flatten(0, 1)[:length]
                assert (got == tokens[:length, None, None]).all(), (window, row)


def parents_of(prompts: int, beams: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(0, beams, (prompts, beams), generator=generator)
    return (drawn + torch.arange(prompts)[:, None] * beams).flatten()


def check(prompts: int, beams: int, windows: int, page: int, device: str, how: Any = fork, steps: int = 11) -> None:
    torch.manual_seed(beams)
    ours, theirs = (Beams.make(prompts, beams, windows, page, 1 + steps // page, device) for _ in range(2))
    for name in ("tables", "own"):
        getattr(theirs.state, name).copy_(getattr(ours.state, name))
    generator = torch.Generator().manual_seed(page)
    for step in range(steps):
        parents = parents_of(prompts, beams, generator).to(device)
        for held, function in ((ours, how), (theirs, fork_reference.fork)):
            held.append(100.0 * step)
            held.go_on(parents, function)
            held.assert_right()
        assert torch.equal(ours.state.moves, theirs.state.moves)
        assert torch.equal(ours.state.tables, theirs.state.tables)
    for index, pages in enumerate(ours.pages):
        assert torch.equal(pages, theirs.pages[index])


SIZES = [(1, 4, 1, 4), (3, 2, 2, 4), (2, 5, 1, 16), (2, 1, 1, 2), (1, 9, 2, 1)]


@pytest.mark.parametrize(("prompts", "beams", "windows", "page"), SIZES)
def test_reference(prompts, beams, windows, page):
    check(prompts, beams, windows, page, "cpu", fork_reference.fork)


@pytest.mark.interpreter
@pytest.mark.parametrize(("prompts", "beams", "windows", "page"), SIZES)
def test_fork(prompts, beams, windows, page):
    check(prompts, beams, windows, page, "cpu")


@pytest.mark.interpreter
def test_a_run_that_is_taken_back_writes_no_page():
    beams = Beams.make(2, 3, 1, 4, 2, "cpu")
    beams.append(1.0)
    before = [pages.clone() for pages in beams.pages]
    beams.state.live.zero_()
    beams.state.parents.copy_(torch.tensor([1, 1, 1, 3, 3, 4]))
    fork(beams.state)
    assert all(torch.equal(pages, held) for pages, held in zip(beams.pages, before, strict=True))
    assert (beams.state.moves[..., 0] == -1).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [1, 8, 200])
def test_pages_are_copied_in_all_tensors(dim):
    tensors = [torch.arange(9 * 4 * 2 * dim).view(9, 4, 2, dim) + 1000 * index for index in range(3)]
    expected = [pages.clone() for pages in tensors]
    moves = [(0, 8), (-1, 5), (3, 7), (1, 6), (0, 4)]
    for pages in expected:
        for source, target in moves:
            if source >= 0:
                pages[target] = pages[source]
    places = torch.tensor([[pages.data_ptr(), pages[0].nbytes // 8, 0] for pages in tensors])
    copy_pages(torch.tensor([moves], dtype=torch.int32), places)
    assert all(torch.equal(pages, held) for pages, held in zip(tensors, expected, strict=True))


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    state = Beams.make(1, 2, 1, 4, 2, "cpu").state
    for beams in (0, 3, MOST_BEAMS + 1):
        with pytest.raises(ValueError, match="beams"):
            fork(replace(state, beams=beams))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("prompts", "beams", "windows", "page", "steps"),
    [*((*size, 35) for size in SIZES), (4, 4, 1, 16, 35), (40, 3, 1, 16, 18), (1, MOST_BEAMS, 1, 4, 9)],
)
def test_sweep(prompts, beams, windows, page, steps):
    check(prompts, beams, windows, page, "cuda", steps=steps)
