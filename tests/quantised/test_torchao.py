"""Which of torchao's weights are read as they lie, by stand-ins: torchao packs tinygemm's tiles on a GPU alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hf_fastattn.kernels.quantised.weights import TiledInts
from hf_fastattn.quantised import torchao
from hf_fastattn.quantised.modules import quantised_linear
from tests.kernels.quantised.weight_cases import tiled_ints

BF16 = torch.bfloat16


class Int4TilePackedTo4dTensor(SimpleNamespace):
    """The attributes of torchao's class of that name."""


Int4TilePackedTo4dTensor.__module__ = "torchao.quantization"


def stand_in(rows: int = 24, columns: int = 1024, group: int = 128, **over: Any) -> Any:
    held = tiled_ints(rows, columns, group)
    given = {
        "qdata": held.words, "scale_and_zero": held.scales, "block_size": [1, group], "shape": torch.Size((rows, columns)),
        "act_pre_scale": None, **over,
    }  # fmt: skip
    return Int4TilePackedTo4dTensor(**given)


def test_tiles_are_read() -> None:
    weight = stand_in()
    found = torchao.weight_of(weight, 1024)
    assert isinstance(found, TiledInts) and (found.rows, found.columns, found.group) == (24, 1024, 128)
    assert found.words is weight.qdata and found.scales is weight.scale_and_zero


@pytest.mark.parametrize(
    ("columns", "over"),
    [
        (896, {"shape": torch.Size((24, 896))}),
        (1024, {"act_pre_scale": torch.ones(1)}),
        (1024, {"block_size": [2, 128]}),
        (1024, {"qdata": torch.zeros(2, 3, 8, 32, 4, dtype=torch.int32)}),
    ],
)
def test_others_are_not(columns: int, over: dict[str, Any]) -> None:
    """Padded columns, scaled inputs, groups over rows, and experts in one tensor."""
    assert torchao.weight_of(stand_in(**over), columns) is None


@pytest.mark.parametrize(("group", "dtype", "known"), [(128, BF16, True), (64, BF16, False), (128, torch.float16, False)])
def test_a_layer_with_tiles(group: int, dtype: torch.dtype, known: bool) -> None:
    """Groups are of whole tiles, and x is of bf16: for others tinygemm rounds x first."""
    linear = nn.Linear(1024, 24, bias=False)
    linear._parameters["weight"] = stand_in(group=group)
    assert (quantised_linear(linear, torch.device("cpu"), dtype) is not None) == known
