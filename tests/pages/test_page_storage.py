"""Tensors behind pages: when they grow or shrink, one layer at a time is there twice."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from hf_fastattn.pages.page_group import PageGroup
from hf_fastattn.pages.page_pool import PagePool
from hf_fastattn.pages.page_storage import FEW_COPIES, PageStorage, copied_with

LAYERS, PAGE = 5, 2 * 4 * 2 * 8 * 4


class Live:
    """Bytes of page tensors that exist, and the most of them at any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self.most = self.made = 0
        grown = PageStorage._grown

        def noted(*args: Any) -> torch.Tensor:
            pages = grown(*args)
            self._tensors.append(weakref.ref(pages))
            self.most, self.made = max(self.most, self.bytes), self.made + 1
            return pages

        monkeypatch.setattr(PageStorage, "_grown", staticmethod(noted))

    @property
    def bytes(self) -> int:
        """Of all tensors that somebody holds."""
        return sum(pages.nbytes for held in self._tensors if (pages := held()) is not None)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    return Live(monkeypatch)


def filled(capacity: int = 6) -> PageStorage:
    storage, states = PageStorage(4), torch.zeros(2, 8)
    for layer in range(LAYERS):
        for pages in storage.layer(layer, states, capacity):
            pages.copy_(torch.arange(capacity, dtype=torch.float32)[:, None, None, None] + 100 * layer)
    return storage


CHANGES: dict[str, Callable[[PageStorage], None]] = {
    "grow": lambda storage: storage.grow(8),
    "copy": lambda storage: storage.copy([(1, 7)], 8),
    "write": lambda storage: [storage.layer(layer, torch.zeros(2, 8), 8) for layer in range(LAYERS)] and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_growth_holds_one_layer_twice(change: str, live: Live) -> None:
    storage = filled()
    assert live.bytes == live.most == LAYERS * 6 * PAGE
    CHANGES[change](storage)
    assert live.bytes == storage.nbytes == LAYERS * 8 * PAGE
    assert live.most == (LAYERS * 8 + 6) * PAGE
    for layer in range(LAYERS):
        for pages in storage.pages(layer):
            assert pages[:6, 0, 0, 0].tolist() == [100 * layer + page for page in range(6)]


def test_shrinking_holds_nothing_twice(live: Live) -> None:
    storage = filled()
    storage.shrink(5)
    assert live.bytes == storage.nbytes == LAYERS * 5 * PAGE and live.most == LAYERS * 6 * PAGE


def test_pages_of_which_none_is_held_are_dropped_before_more_are_made(live: Live) -> None:
    group = PageGroup(None, PagePool(6), filled())
    group.ensure(8)
    assert group.pool.capacity == 8 and live.bytes == 0
    group.pool.allocate(1)
    group.grow_storage()
    group.storage.layer(0, torch.zeros(2, 8), 8)
    group.ensure(9)
    assert group.pool.capacity == 10 and group.storage.capacity == 8


def test_where_memory_is_short_there_are_tensors_for_held_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    group = PageGroup(None, PagePool(6), filled())
    group.pool.allocate(6)
    group.pool.ensure(100)
    group.pool.allocate(2)
    grown = PageStorage._grown

    def out_of_memory(old: Any, shape: Any, like: Any) -> torch.Tensor:
        if shape[0] > most:
            raise torch.OutOfMemoryError("simulated")
        return grown(old, shape, like)

    monkeypatch.setattr(PageStorage, "_grown", staticmethod(out_of_memory))
    most = 7
    with pytest.raises(torch.OutOfMemoryError):
        group.grow_storage()
    assert group.storage.capacity == 6 and group.pool.in_use == 8
    most = 8
    group.grow_storage()
    assert group.storage.capacity == group.pool.capacity == 8
    assert group.storage.pages(4)[1][:6, 0, 0, 0].tolist() == [400, 401, 402, 403, 404, 405]


@pytest.mark.parametrize("eight_bits", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("count", [1, FEW_COPIES, FEW_COPIES + 1])
def test_pages_are_copied_in_every_layer(count: int, eight_bits: torch.dtype | None) -> None:
    storage, states = PageStorage(4, eight_bits), torch.zeros(2, 8)
    for layer in range(LAYERS):
        held = copied_with(storage.layer(layer, states, 2 * count))
        for number, pages in enumerate(held):
            pages.copy_(torch.randint(0, 99, pages.shape, generator=torch.Generator().manual_seed(9 * layer + number)))
    before = [[pages.clone() for pages in copied_with(storage.pages(layer))] for layer in range(LAYERS)]
    moves = [(number, 2 * count - 1 - number) for number in range(count)]
    storage.copy(moves, 2 * count + 3)
    for layer in range(LAYERS):
        for pages, old in zip(copied_with(storage.pages(layer)), before[layer], strict=True):
            assert torch.equal(pages[: 2 * count], torch.cat((old[:count], old[:count].flip(0))))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, FEW_COPIES + 5])
@pytest.mark.parametrize("eight_bits", [None, torch.int8])
def test_one_launch_copies_in_all_layers(count: int, eight_bits: torch.dtype | None) -> None:
    from hf_fastattn.kernels.sampling import fork

    storage, states = PageStorage(4, eight_bits), torch.zeros(2, 8, device="cuda")
    for turn, capacity in enumerate((64, 96)):
        for layer in range(LAYERS):
            for pages in copied_with(storage.layer(layer, states, capacity)):
                values = torch.arange(pages.numel(), device="cuda").view(pages.shape) + 7 * layer
                pages.copy_(values.to(pages.dtype) if eight_bits is None else (values % 251).to(pages.dtype))
        before = [pages.clone() for layer in range(LAYERS) for pages in copied_with(storage.layer(layer, states, capacity))]
        moves = [(2 * place + turn, 63 - place) for place in range(count)]
        with mock.patch.object(fork, "copy_pages", side_effect=fork.copy_pages) as launched:
            storage.copy(moves, capacity)
        assert launched.call_count == 1
        after = [pages for layer in range(LAYERS) for pages in copied_with(storage.layer(layer, states, capacity))]
        for old, new in zip(before, after, strict=True):
            for source, target in moves:
                old[target] = old[source]
            assert torch.equal(old, new)


@pytest.mark.gpu
def test_the_reference_backend_launches_no_kernel_of_ours() -> None:
    storage, states = PageStorage(4, backend="reference"), torch.zeros(2, 8, device="cuda")
    for pages in storage.layer(0, states, 8):
        pages.copy_(torch.arange(8.0, device="cuda")[:, None, None, None])
    storage.copy([(1, 7)], 8)
    assert storage._places is not None and storage._places[1] is None
    assert all(bool((pages[7] == 1).all()) for pages in storage.layer(0, states, 8))
