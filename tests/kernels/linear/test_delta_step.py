"""The decode step of Gated DeltaNet in one kernel against the reference, and both against fp64."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.linear import delta_reference
from hf_fastattn.kernels.linear.delta_step import delta_step
from tests.kernels.cases import assert_close
from tests.kernels.linear.delta_cases import cloned, in_dtype, parts, states

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = {"small": (2, 2, 8, 16), "one head": (1, 1, 16, 8), "three values a key": (2, 3, 16, 16), "wide": (1, 2, 128, 128)}


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    interleaved: bool = False,
    lengths: list[int] | None = None,
    columns: int | None = None,
) -> None:
    """Three rows of four, in their slots; in place with `lengths`."""
    slots, slots_out = [3, -1, 0, 5], [1, -1, 3, 0]
    x, weights = in_dtype(*parts(4, *shape, interleaved=interleaved), dtype, device)
    held = states(x, slots, 6, slots_out=slots_out, lengths=lengths)
    plain, exact = cloned(held), cloned(held, FP64)
    arrived = torch.zeros(4 * shape[0] * shape[1], dtype=torch.int32, device=device)
    got = delta_step(x, weights, held, arrived, columns=columns)
    assert not arrived.any()
    want = delta_reference.delta_step(*in_dtype(x, weights, FP64, device), exact)
    assert_close("output", got, delta_reference.delta_step(x, weights, plain), want)
    assert got.dtype == dtype and bool((got[1] == 0).all())
    written = sorted(slots_out if lengths is None else slots)[1:]
    assert torch.equal(held.conv_out[written], plain.conv_out[written])
    assert_close("state", held.recurrent_out[written], plain.recurrent_out[written], exact.recurrent_out[written])
    free = [slot for slot in range(6) if slot not in written]
    assert bool(held.recurrent_out[free].isnan().all()) and bool(held.conv_out[free].isnan().all())


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "dtype"), [("small", FP32), ("small", FP16), ("one head", BF16), ("three values a key", BF16), ("wide", FP32)]
)
def test_equals_the_reference(shape: str, dtype: torch.dtype) -> None:
    check(SHAPES[shape], dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("first", "interleaved", "dtype"), [(1, False, FP32), (2, True, BF16), (3, True, FP32), (8, False, BF16)]
)
def test_in_place(first: int, interleaved: bool, dtype: torch.dtype) -> None:
    check(SHAPES["small"], dtype, interleaved=interleaved, lengths=[first, 7, first + 5, 100])


@pytest.mark.interpreter
@pytest.mark.parametrize("columns", [4, 8])
@pytest.mark.parametrize("lengths", [None, [5, 7, 8, 100]])
def test_states_by_columns(columns: int, lengths: list[int] | None) -> None:
    check(SHAPES["small"], BF16, lengths=lengths, columns=columns)


@pytest.mark.interpreter
def test_steps_in_place_forget_and_remember() -> None:
    """Many steps of two rows: errors do not add up."""
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    x, weights = parts(2, 1)
    held = states(x, [1, 0], 2, lengths=lengths.tolist())
    plain, exact = cloned(held), cloned(held, FP64)
    for step in range(10):
        x, _ = parts(2, 1, seed=step + 10)
        after = lengths + step
        got = delta_step(x, weights, held._replace(seq_lens=after))
        reference = delta_reference.delta_step(x, weights, plain._replace(seq_lens=after))
        want = delta_reference.delta_step(*in_dtype(x, weights, FP64), exact._replace(seq_lens=after))
    assert_close("output", got, reference, want)
    assert torch.equal(held.conv, plain.conv)
    assert_close("state", held.recurrent, plain.recurrent, exact.recurrent)


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused() -> None:
    x, weights = parts(2)
    held = states(x, [0, 1], 2)
    with pytest.raises(ValueError, match="powers of two"):
        odd, more = parts(2, dk=12)
        delta_step(odd, more, held)
    with pytest.raises(ValueError, match="conv"):
        delta_step(x, weights._replace(conv=weights.conv[:-1].contiguous()), held)
    with pytest.raises(ValueError, match="fp32"):
        delta_step(x, weights, held._replace(recurrent=held.recurrent.double()))
    with pytest.raises(ValueError, match="in place"):
        delta_step(x, weights, held._replace(seq_lens=torch.ones(2, dtype=torch.int32)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [None, [5, 7, 8, 100]])
@pytest.mark.parametrize("columns", [None, 8])
def test_on_the_gpu(shape: str, dtype: torch.dtype, lengths: list[int] | None, columns: int | None) -> None:
    check(SHAPES[shape], dtype, "cuda", lengths=lengths, columns=columns)
