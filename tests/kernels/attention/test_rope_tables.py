"""cos and sin of positions by one launch, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.attention import rope_reference
from hf_fastattn.kernels.attention.rope_tables import rope_tables
from tests.kernels.cases import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(rows: int, half: int, dtype: torch.dtype, *, factor: float = 1.0, last: int = 40_000, device: str = "cpu") -> None:
    """The tables of rows at positions up to `last`, one of them 0."""
    frequencies = (10_000.0 ** -(torch.arange(half, device=device) / half)).float()
    generator = torch.Generator().manual_seed(rows)
    position_ids = torch.randint(0, last + 1, (rows, 1), generator=generator).to(device)
    position_ids[0] = 0
    position_ids[-1] = last
    got = rope_tables(frequencies, position_ids, factor, dtype)
    plain = rope_reference.tables(frequencies, position_ids, factor, dtype)
    # Angles are rounded to fp32, as the model rounds them: what is compared is how cos and sin are computed.
    angles = (position_ids[..., None].float() * frequencies).double().repeat(1, 1, 2)
    exact = angles.cos() * factor, angles.sin() * factor, rope_reference.signed_sin(angles.sin() * factor)
    for name, ours, theirs, want in zip(("cos", "sin", "signed sin"), got, plain, exact, strict=True):
        assert ours.shape == (rows, 1, 2 * half) and ours.dtype is dtype and ours.is_contiguous()
        assert_close(name, ours, theirs, want)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "half"), [(1, 64), (3, 32), (5, 20)])
def test_against_torch(rows: int, half: int, dtype: torch.dtype) -> None:
    check(rows, half, dtype)
    check(rows, half, dtype, factor=1.25, last=130_000)


@pytest.mark.interpreter
def test_several_columns_and_narrow_frequencies() -> None:
    frequencies, position_ids = torch.rand(8).to(BF16), torch.arange(6).view(2, 3)
    for ours, theirs in zip(
        rope_tables(frequencies, position_ids, 0.5, FP32),
        rope_reference.tables(frequencies, position_ids, 0.5, FP32),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_tokens() -> None:
    assert [len(table) for table in rope_tables(torch.ones(4), torch.zeros(0, 1, dtype=torch.int64), 1.0, BF16)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"frequencies": torch.ones(2, 4)}, "frequencies"),
        ({"frequencies": torch.ones(8)[::2]}, "frequencies"),
        ({"frequencies": torch.ones(4, dtype=torch.float64)}, "frequencies"),
        ({"position_ids": torch.zeros(2, 1)}, "position_ids"),
        ({"position_ids": torch.zeros(2, 4, dtype=torch.int64)[:, ::2]}, "position_ids"),
        ({"position_ids": torch.zeros(2, dtype=torch.int64)}, "position_ids"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_bad_arguments(over: dict[str, object], message: str) -> None:
    given = {
        "frequencies": torch.ones(4),
        "position_ids": torch.zeros(2, 1, dtype=torch.int64),
        "factor": 1.0,
        "dtype": BF16,
    }
    with pytest.raises(ValueError, match=message):
        rope_tables(**{**given, **over})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "half"), [(1, 64), (64, 64), (7, 16), (3, 40)])
def test_on_gpu(rows: int, half: int, dtype: torch.dtype) -> None:
    check(rows, half, dtype, device="cuda")
    check(rows, half, dtype, factor=0.75, last=1_000_000, device="cuda")
