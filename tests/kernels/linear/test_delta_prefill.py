"""Gated DeltaNet over packed rows by chunks, in kernels against the reference, and both against fp64."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.linear import delta_reference
from hf_fastattn.kernels.linear.delta_parts import DeltaInputs
from hf_fastattn.kernels.linear.delta_prefill import delta_prefill
from tests.kernels.cases import assert_close
from tests.kernels.linear.delta_cases import in_dtype, parts

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def check(
    lengths: list[int],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    shape: tuple[int, ...] = (1, 2, 16, 16),
    interleaved: bool = False,
    goes_on: bool = False,
) -> None:
    """Outputs and both states; rows that go on have states before."""
    x, weights = in_dtype(*parts(sum(lengths), *shape, interleaved=interleaved), dtype, device)
    wide, exact_weights = in_dtype(x, weights, FP64, device)
    before, exact_before = (None, None), (None, None)
    if goes_on:
        first, _ = in_dtype(*parts(7 * len(lengths), *shape, seed=5), dtype, device)
        _, *before = delta_reference.delta_prefill(first, weights, [7] * len(lengths))
        exact_before = [held.double() for held in before]
    got = delta_prefill(x, weights, lengths, *before)
    plain = delta_reference.delta_prefill(x, weights, lengths, *before)
    want = delta_reference.delta_prefill(wide, exact_weights, lengths, *exact_before)
    assert got[0].dtype == dtype and got[2].dtype == FP32 and torch.equal(got[1], plain[1])
    assert_close("output", got[0], plain[0], want[0])
    assert_close("state", got[2], plain[2], want[2])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("lengths", "dtype"), [([1], FP32), ([70], FP32), ([3, 65], FP32), ([5, 130], BF16), ([64, 2], FP16)]
)
def test_equals_the_reference(lengths: list[int], dtype: torch.dtype) -> None:
    check(lengths, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("lengths", [[2, 66], [1, 1, 3]])
def test_rows_that_go_on(lengths: list[int]) -> None:
    check(lengths, FP32, goes_on=True, interleaved=True)


@pytest.mark.interpreter
def test_a_row_without_a_token_keeps_its_states() -> None:
    check([0, 5], FP32, goes_on=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(2, 2, 8, 16), (1, 3, 32, 8), (1, 1, 16, 64)])
def test_other_heads(shape: tuple[int, ...]) -> None:
    check([20, 2], FP32, shape=shape)


@pytest.mark.interpreter
def test_equal_keys_and_nothing_forgotten() -> None:
    """The hardest system to solve: every key is the same, and replaces all that was written."""
    x, weights = parts(64, 1, 1, 16, 16)
    x = DeltaInputs(x.q, torch.ones_like(x.k), x.v, x.z, torch.full_like(x.b, 30.0), torch.full_like(x.a, -30.0))
    weights = weights._replace(conv=weights.conv.abs())
    got = delta_prefill(x, weights, [64])
    want = delta_reference.delta_prefill(*in_dtype(x, weights, FP64), [64])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="add up"):
        delta_prefill(*parts(5), [2, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("lengths", [[1, 63, 64, 65], [1000], [5, 4, 3]])
def test_on_the_gpu(lengths: list[int], goes_on: bool, dtype: torch.dtype) -> None:
    check(lengths, dtype, "cuda", shape=(2, 2, 128, 128), goes_on=goes_on)
