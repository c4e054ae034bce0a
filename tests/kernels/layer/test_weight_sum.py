"""Sums over the bits of weights: any change is seen, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_fastattn.graphs.model_state import ModelState
from hf_fastattn.kernels.layer import weight_sum_host, weight_sum_reference
from hf_fastattn.kernels.layer.weight_sum_host import host_sum, row_sums

Sum = Callable[[list[Tensor]], list[int]]


def reference(tensors: list[Tensor]) -> list[int]:
    return [int(one) for one in weight_sum_reference.weight_sum(tensors)]


def in_triton(tensors: list[Tensor]) -> list[int]:
    from hf_fastattn.kernels.layer import weight_sum

    table = weight_sum.table_of(tensors, tensors[0].device)
    return weight_sum.weight_sum(table, torch.empty(8, dtype=torch.int64, device=tensors[0].device)).tolist()


TRITON = pytest.param((in_triton, "cpu"), marks=pytest.mark.interpreter, id="interpreted")
GPU = pytest.param((in_triton, "cuda"), marks=pytest.mark.gpu, id="cuda")


REFERENCE = pytest.param((reference, "cpu"), id="reference")
HOST = pytest.param((host_sum, "cpu"), id="host")


@pytest.fixture(params=[REFERENCE, HOST, TRITON, GPU])
def kind(request: pytest.FixtureRequest) -> tuple[Sum, str]:
    return request.param


def weights(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(300, 256), (64,), (2, 70_000), (1, 8)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [made[0].to(device), made[1].to(device, torch.bfloat16), made[2].to(device), made[3].to(device)]


CHANGES: dict[str, Callable[[list[Tensor]], object]] = {
    "a bit": lambda held: held[0].view(torch.int32)[7, 9].bitwise_xor_(1),
    "the last one": lambda held: held[2].view(torch.int32)[-1, -1].bitwise_xor_(1 << 20),
    "two signs": lambda held: held[0][:2, 1].neg_(),
    "all signs": lambda held: held[0].neg_(),
    "a sign in 16 bits": lambda held: held[1][:1].neg_(),
    "rows": lambda held: held[0].copy_(held[0][torch.randperm(300, generator=torch.Generator().manual_seed(2))]),
    "halves": lambda held: held[2].copy_(held[2].flip(0)),
    "up here, down there": lambda held: held[0].view(torch.int32)[:2, 0].add_(torch.tensor([5, -5]).to(held[0].device)),
    "two tensors": lambda held: (held[3].copy_(held[0][0, :8]), held[0][0, :8].zero_()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(kind: tuple[Sum, str], name: str) -> None:
    summed, device = kind
    held = weights(device)
    before = summed(held)
    assert summed(held) == before == summed(weights(device))
    CHANGES[name](held)
    assert summed(held) != before


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("part", [2**20, 20_000])
def test_a_change_is_seen_between_two_mixes_and_in_every_part(name: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of these tests fill many rows of few lanes."""
    monkeypatch.setattr(weight_sum_host, "LANES", 127)
    monkeypatch.setattr(weight_sum_host, "PART", part)
    test_a_change_is_seen((host_sum, "cpu"), name)


@pytest.mark.parametrize("rows", [2, 63, 126, 300])
def test_the_highest_bits_do_not_cancel(rows: int) -> None:
    """Of every word, and of every other one."""
    for step in (1, 2):
        words = torch.randint(-(2**62), 2**62, (rows * weight_sum_host.LANES,))
        before = host_sum([words])
        words[::step].bitwise_xor_(torch.tensor(-(2**63)))
        assert host_sum([words]) != before


def test_threads_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sum_host, "PART", 2**14)
    held = [torch.randn(300, 1000), torch.randn(70_000)]
    before = host_sum(held)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert host_sum(held) == before and len(before) > 3


def test_parts_begin_anywhere() -> None:
    """Those of a sequence of tensors hold each word once, in order."""
    words = [np.arange(first, last) for first, last in ((0, 5), (5, 6), (6, 40), (40, 41))]
    for size in (1, 3, 7, 40, 41, 99):
        parts = list(weight_sum_host._divided(words, size))
        assert [sum(map(len, part)) for part in parts[:-1]] == [size] * (len(parts) - 1)
        assert np.array_equal(np.concatenate([piece for part in parts for piece in part]), np.arange(41))


def test_rows_of_lanes_need_not_begin_where_tensors_do() -> None:
    """Rows of lanes and mixes as the module describes them, word by word."""
    pieces = [torch.randint(-(2**62), 2**62, (size,)) for size in (5, 8190, 20_000, 1, 8191 * 70 + 3, 8191)]
    words, lanes, rows = torch.cat(pieces).numpy(), weight_sum_host.LANES, weight_sum_host.ROWS
    total = np.zeros(lanes, np.int64)
    for number, start in enumerate(range(0, len(words), lanes)):
        if number and number % rows == 0:
            total = (total ^ (total >> 29)) * -3
        row = words[start : start + lanes]
        total[: len(row)] += row
    total = (total ^ (total >> 29)) * -3 * (np.arange(lanes) * 2 + weight_sum_host.ODD)
    assert host_sum(pieces) == [int(((total ^ (total >> 29)) * -3).sum())]


def test_words_by_their_addresses() -> None:
    base = torch.randn(101)
    held = [torch.randn(30, 40), base[1:]]
    assert weight_sum_host.whole_words(held) is None
    held[1] = base[:100]
    words = weight_sum_host.whole_words(held)
    assert words is not None and weight_sum_host.sum_of_words(words) == host_sum(held)
    held[0][3, 4] += 1
    assert weight_sum_host.sum_of_words(words) == host_sum(held)


ROW_CHANGES: dict[str, Callable[[Tensor], object]] = {
    "a bit": lambda row: row.view(torch.int32)[7].bitwise_xor_(1),
    "the highest bit": lambda row: row.view(torch.int32)[-1].bitwise_xor_(-(2**31)),
    "two signs": lambda row: row[1:4:2].neg_(),
    "all signs": lambda row: row.neg_(),
    "exchanged": lambda row: row.copy_(row.view(-1, 2).flip(0).flatten()),
    "up here, down there": lambda row: row.view(torch.int64)[:2].add_(torch.tensor([3, -3])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROW_CHANGES)
def test_a_change_of_a_row_is_seen_in_its_sum(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = np.array([3, 49, 0, 7, 12])
    before = row_sums(weight, rows)
    assert len(set(before)) == len(before) and row_sums(weight, rows[1:2])[0] == before[1]
    ROW_CHANGES[name](weight[49])
    weight[5] += 1
    assert (row_sums(weight, rows) != before).tolist() == [False, True, False, False, False]


def test_rows_are_exchanged() -> None:
    weight, rows = torch.randn(50, 64), np.arange(50)
    before = row_sums(weight, rows)
    weight[[3, 9]] = weight[[9, 3]]
    assert np.flatnonzero(row_sums(weight, rows) != before).tolist() == [3, 9]


def test_many_rows_are_summed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.randn(50, 64), np.arange(50)
    before = row_sums(weight, rows)
    monkeypatch.setattr(weight_sum_host, "BLOCK", 3 * 32)
    assert np.array_equal(row_sums(weight, rows), before)
    assert row_sums(torch.zeros(3, 64), np.arange(3)).all()


@pytest.mark.parametrize("summed", [reference, host_sum])
def test_odd_places_and_sizes(summed: Sum) -> None:
    """Tensors that are no whole words, begin in the middle of one, or are views."""
    base = torch.randn(101, generator=torch.Generator().manual_seed(1)).bfloat16()
    held = [base[1:8], base[9:10], base[11:91].view(8, 10).T, torch.tensor([True, False, True])]
    before = summed(held)
    base[5] += 1
    after = summed(held)
    held[3][1] = True
    assert len({tuple(before), tuple(after), tuple(summed(held))}) == 3
    base[0] += 1
    assert summed(held) == summed(held)


def test_a_state_without_weights_looks_at_modules_alone() -> None:
    module = torch.nn.Linear(4, 4)
    assert ModelState(True).why_not(torch.nn.Sequential(module)) is None
    meta = torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))
    assert ModelState(True).why_not(meta) == "the weights are offloaded"
    assert ModelState(False).why_not(meta) is None
