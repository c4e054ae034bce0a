"""Rows of prompts that are equal: by their bytes, and by sums that are compared in full where they agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_fastattn.generation import equal_rows
from hf_fastattn.generation.equal_rows import numbers_by_sums, numbers_of_rows


def rows_like(numbers: list[int], columns: int = 50) -> list[Tensor]:
    """Token ids, a mask and positions of rows that are equal where their numbers are."""
    torch.manual_seed(0)
    count = max(numbers) + 1
    tensors = [torch.randint(100, (count, columns)), torch.rand(count, columns) > 0.1, torch.randint(9, (count, columns))]
    return [tensor[numbers] for tensor in tensors]


@pytest.mark.parametrize("numbers", [[0], [0, 1, 2], [0, 0, 0], [0, 1, 0, 2, 1, 3]])
def test_numbers(numbers: list[int]) -> None:
    tensors = rows_like(numbers)
    assert numbers_of_rows(tensors) == numbers == numbers_by_sums(tensors, tensors)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_value_differs(place: int) -> None:
    tensors = rows_like([0, 0, 0, 0])
    tensors[place] = tensors[place].clone()
    tensors[place][2, 49] = ~tensors[place][2, 49] if tensors[place].dtype == torch.bool else tensors[place][2, 49] + 1
    assert numbers_of_rows(tensors) == [0, 0, 1, 0] == numbers_by_sums(tensors, tensors)


def test_values_that_change_places_differ() -> None:
    row = torch.arange(64)
    tensors = [torch.stack([row, row.flip(0), row.roll(1), row])]
    assert numbers_by_sums(tensors, tensors) == [0, 1, 2, 0]


def test_embeddings_beside_integers_are_compared_by_their_bytes() -> None:
    ids = rows_like([0, 0, 0])[0]
    embeds = torch.zeros(3, 50, 4)
    embeds[1, 7, 2] = -0.0
    assert numbers_by_sums([ids, embeds], [ids]) == [0, 1, 0]


def test_sums_that_agree_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not taken for equal because their sums are."""
    monkeypatch.setattr(equal_rows, "_sums", lambda words: words.new_zeros(len(words)))
    tensors = rows_like([0, 1, 0])
    assert numbers_by_sums(tensors, tensors) == [0, 1, 0]


def test_rows_without_columns_are_equal() -> None:
    assert numbers_of_rows([torch.zeros(3, 0, dtype=torch.int64)]) == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [[0], [0, 1, 2], [0, 1, 0, 2, 1, 3]])
def test_numbers_on_a_gpu(numbers: list[int]) -> None:
    assert numbers_of_rows([tensor.cuda() for tensor in rows_like(numbers, 5000)]) == numbers
