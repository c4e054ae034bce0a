"""Which shapes the GPU sweep takes: few specialisations, stratified over what they depend on, many batches each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest
import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LONGEST = 5000
WINDOWS = (1, 17, 128, 1000, 4096)


@dataclass(frozen=True)
class Shape:
    """What a specialisation of the attention kernels depends on."""

    ratio: int
    dim: int
    page: int
    dtype: torch.dtype
    window: bool = False
    softcap: float | None = None

    def __str__(self) -> str:
        extras = ("-window" if self.window else "") + ("-softcap" if self.softcap else "")
        return f"R{self.ratio}-D{self.dim}-P{self.page}-{str(self.dtype).removeprefix('torch.')}{extras}"

    @property
    def groups(self) -> int:
        return 1 if self.ratio > 7 else 2


# Every R, D, page size and dtype; windows and softcaps apart and together.
SHAPES = (
    Shape(4, 128, 16, BF16),
    Shape(4, 128, 16, BF16, window=True),
    Shape(4, 128, 256, BF16, softcap=50.0),
    Shape(1, 128, 16, BF16),
    Shape(7, 128, 64, BF16),
    Shape(5, 64, 16, BF16, window=True, softcap=5.0),
    Shape(8, 64, 128, BF16),
    Shape(16, 256, 32, BF16),
    Shape(8, 256, 16, BF16, window=True, softcap=50.0),
    Shape(2, 80, 64, BF16),
    Shape(1, 96, 16, FP16, window=True),
    Shape(4, 64, 32, FP16, softcap=50.0),
    Shape(16, 128, 16, FP16),
    Shape(2, 16, 256, FP16),
    Shape(4, 128, 16, FP32),
    Shape(7, 80, 64, FP32, window=True),
    Shape(1, 256, 128, FP32, softcap=50.0),
    Shape(5, 16, 16, FP32),
)
# Those that are also run with few queries a row, where the launchers take another tile.
SHORT = (SHAPES[0], SHAPES[5], SHAPES[7], SHAPES[14])
# All of the above, appends and merges, on one device.
MOST_SPECIALISATIONS = 60


def shapes(chosen: tuple[Shape, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", chosen, ids=str)


def length(random: Random, page: int, longest: int = LONGEST) -> int:
    """From 1 to `longest`: near the edges of pages and tiles as often as anywhere."""
    edges = [1, 2, page - 1, page, page + 1, 63, 64, 65, 127, 128, 129, 4 * page, 1000, longest]
    return min(random.choice([*edges, *(random.randint(1, longest) for _ in edges)]), longest)


def batches(shape: Shape, count: int) -> Iterator[tuple[Random, dict, dict]]:
    """For each of `count` batches a random generator, options of `make_batch`, and the keywords of the kernel."""
    for seed in range(count):
        random = Random(f"{shape} {seed}")
        window = random.choice(WINDOWS) if shape.window else None
        options = {
            "page": shape.page,
            "groups": shape.groups,
            "ratio": shape.ratio,
            "dim": shape.dim,
            "dtype": shape.dtype,
            "window": window,
            "scattered": True,
            "factor": random.choice((1.0, 1.0, 30.0)),
            "q_layout": random.choice(("contiguous", "fused", "transposed")),
            "heads_first": random.random() < 0.3,
            "device": "cuda",
        }
        yield random, options, {"window": window, "softcap": shape.softcap}
