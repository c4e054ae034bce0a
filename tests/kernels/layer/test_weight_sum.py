"""Sums over the bits of weights: any change is seen, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_fastattn.graphs.model_state import ModelState
from hf_fastattn.kernels.layer import weight_sum_reference

Sum = Callable[[list[Tensor]], list[int]]


def reference(tensors: list[Tensor]) -> list[int]:
    return [int(one) for one in weight_sum_reference.weight_sum(tensors)]


def in_triton(tensors: list[Tensor]) -> list[int]:
    from hf_fastattn.kernels.layer import weight_sum

    table = weight_sum.table_of(tensors, tensors[0].device)
    return weight_sum.weight_sum(table, torch.empty(8, dtype=torch.int64, device=tensors[0].device)).tolist()


TRITON = pytest.param((in_triton, "cpu"), marks=pytest.mark.interpreter, id="interpreted")
GPU = pytest.param((in_triton, "cuda"), marks=pytest.mark.gpu, id="cuda")


@pytest.fixture(params=[pytest.param((reference, "cpu"), id="reference"), TRITON, GPU])
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


def test_odd_places_and_sizes() -> None:
    """Tensors that are no whole words, begin in the middle of one, or are views."""
    base = torch.randn(101, generator=torch.Generator().manual_seed(1)).bfloat16()
    held = [base[1:8], base[9:10], base[11:91].view(8, 10).T, torch.tensor([True, False, True])]
    before = reference(held)
    base[5] += 1
    after = reference(held)
    held[3][1] = True
    assert len({tuple(before), tuple(after), tuple(reference(held))}) == 3
    base[0] += 1
    assert reference(held) == reference(held)


def test_a_state_without_weights_looks_at_modules_alone() -> None:
    module = torch.nn.Linear(4, 4)
    assert ModelState(True).why_not(torch.nn.Sequential(module)) is None
    meta = torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))
    assert ModelState(True).why_not(meta) == "the weights are offloaded"
    assert ModelState(False).why_not(meta) is None
