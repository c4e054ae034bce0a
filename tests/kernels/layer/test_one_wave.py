"""Products of one token with the norm before them in one kernel, against the same steps in PyTorch."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.layer.configs import RowTile
from hf_fastattn.kernels.layer.one_wave import one_wave
from tests.kernels.cases import assert_close
from tests.kernels.layer.product_cases import EPS, wanted
from tests.kernels.layer.test_norm import rows
from tests.tools.combinations import pairwise

BF16, FP16 = torch.bfloat16, torch.float16
TWO = RowTile(2, 2)


def check(
    k: int,
    counts: list[int],
    dtype: torch.dtype = BF16,
    *,
    norm: bool = False,
    unit_offset: bool = False,
    gated: bool = False,
    bias: bool = False,
    residual: bool = False,
    settled: bool = True,
    tile: RowTile = TWO,
    device: str = "cpu",
) -> None:
    x = rows(1, k, dtype, device, 1)
    weights = [rows(count, k, dtype, device, 2 + i) * k**-0.5 for i, count in enumerate(counts)]
    biases = [rows(1, count, dtype, device, 12 + i)[0] for i, count in enumerate(counts)] if bias else None
    stream = rows(1, counts[0], dtype, device, 22) if residual else None
    factors = rows(1, k, dtype, device, 23)[0] if norm else None
    got = one_wave(
        x, weights, biases, residual=stream, norm=factors, eps=EPS, unit_offset=unit_offset, gated=gated, tile=tile,
        weights_settled=settled,
    )  # fmt: skip
    assert got.dtype is dtype
    assert_close("product", got, *wanted(x, weights, biases, stream, factors, unit_offset, gated))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "norm", "kind", "k"),
    pairwise([BF16, FP16], [False, True], ["plain", "bias", "residual", "gated"], [64, 200, 256, 600]),
)
def test_kinds(dtype, norm, kind, k):
    counts = {"residual": [37], "gated": [19, 19]}.get(kind, [16, 7, 21])
    options = {} if kind == "plain" else {kind: True}
    check(k, counts, dtype, norm=norm, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{"unit_offset": True}, {"settled": False}, {"tile": RowTile(1, 4)}])
def test_options(options):
    check(300, [9, 4], norm=True, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=BF16)}, "must be \\[1, K\\]"),
        ({"x": torch.zeros(1, 64)}, "bf16 or fp16"),
        ({"norm": torch.zeros(63, dtype=BF16)}, "norm"),
        ({"weights": [torch.zeros(8, 64)]}, "weight"),
        ({"weights": [torch.zeros(8, 64, dtype=BF16)] * 4}, "4 weights"),
        ({"biases": [torch.zeros(7, dtype=BF16)]}, "bias"),
        ({"residual": torch.zeros(1, 9, dtype=BF16)}, "residual"),
        ({"gated": True}, "gated"),
        ({"x": torch.zeros(1, 4104, dtype=BF16)}, "longer than"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "x": torch.zeros(1, 64, dtype=BF16), "weights": [torch.zeros(8, 64, dtype=BF16)],
        "tile": TWO, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        one_wave(given.pop("x"), given.pop("weights"), given.pop("biases", None), **given)
