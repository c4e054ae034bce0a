"""The sum over ranks with residual and norm in one kernel, for ranks in one process, whose parts are there already."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.layer import reference
from hf_fastattn.kernels.layer.summed_norm import summed_norm
from tests.kernels.cases import assert_close
from tests.kernels.layer.test_norm import BF16, FP16, FP32, rows


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], device=tensors[0].device)


def check(tokens: int, hidden: int, dtype: torch.dtype, ranks: int, *, bias: bool = False, device: str = "cpu") -> None:
    parts = [rows(tokens, hidden, dtype, device, 10 + rank) for rank in range(ranks)]
    residual = rows(tokens, hidden, dtype, device, 2)
    weight, added = rows(2, hidden, dtype, device, 3)
    flags = [torch.full((tokens, ranks), 9, dtype=torch.int32, device=device) for _ in range(ranks)]
    late = torch.zeros(1, dtype=torch.int32, device=device)
    launches = torch.full((tokens + 1,), 5, dtype=torch.int32, device=device)
    last = launches[-1].clone()
    for rank, part in enumerate(parts):
        flags[rank][:, rank] = 0
        launches[:tokens] = 5
        out, total = summed_norm(
            part, addresses(parts), addresses(flags), launches, late, rank, residual, weight, 1e-5,
            bias=added if bias else None, unit_offset=bool(rank),
        )  # fmt: skip
        summed = sum(one.float() for one in parts).to(dtype)
        summed = (summed.float() + added.float()).to(dtype) if bias else summed
        plain, plain_total = reference.add_rms_norm(summed, residual, weight, 1e-5, unit_offset=bool(rank))
        assert torch.equal(total, plain_total)
        want = reference.rms_norm(plain_total.double(), weight.double(), 1e-5, bool(rank))
        assert_close("norm", out, plain, want)
        # Every rank's flags say that this one has come.
        for other in range(ranks):
            assert bool((flags[other][:, rank] == 6).all())
            flags[other][:, rank] = 9
    assert not late.any() and bool((launches[:tokens] == 6).all()) and launches[-1] == last


@pytest.mark.interpreter
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (3, 100)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_small(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check(tokens, hidden, dtype, 2)


@pytest.mark.interpreter
def test_more_ranks_and_a_bias() -> None:
    check(2, 72, BF16, 4, bias=True)


@pytest.mark.interpreter
def test_a_rank_that_does_not_come() -> None:
    x, flags = rows(2, 64, FP32, "cpu", 1), [torch.zeros(2, 2, dtype=torch.int32) for _ in range(2)]
    launches, late = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    summed_norm(x, addresses([x, x]), addresses(flags), launches, late, 0, x, x[0], 1e-5, looks=3)
    assert late.all()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 4096), (64, 4096), (17, 5120), (2, 16384)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_sizes(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check(tokens, hidden, dtype, 2, device="cuda")


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, one = torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64)
    counts, late = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="launches"):
        summed_norm(x, one, one, counts[:1], late, 0, x, x[0], 1e-5)
    with pytest.raises(ValueError, match="rank=2"):
        summed_norm(x, one, one, counts, late, 2, x, x[0], 1e-5)
    with pytest.raises(ValueError, match="residual"):
        summed_norm(x, one, one, counts, late, 0, x[:1], x[0], 1e-5)
    with pytest.raises(ValueError, match="weight"):
        summed_norm(x, one, one, counts, late, 0, x, x[0, :32], 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        summed_norm(x.T, one, one, counts, late, 0, x, x[0], 1e-5)
