"""Products of a few tokens with the norm before them in one kernel, against the same steps in PyTorch."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.layer import few_rows as few_rows_module
from hf_fastattn.kernels.layer.configs import HOPPER
from hf_fastattn.kernels.layer.few_rows import few_rows, takes
from hf_fastattn.kernels.layer.few_rows_configs import FewRowsTile, few_rows_tile
from tests.kernels.cases import assert_close
from tests.kernels.layer.product_cases import EPS, wanted
from tests.kernels.layer.test_norm import rows
from tests.tools.combinations import pairwise

BF16, FP16 = torch.bfloat16, torch.float16
TWO = FewRowsTile(2, 2, 2)


def check(
    tokens: int,
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
    wide: int = 0,
    tile: FewRowsTile = TWO,
    device: str = "cpu",
) -> None:
    """With `wide`, rows of x and of the residual lie in longer ones, with NaN behind them."""
    x = _within(rows(tokens, k, dtype, device, 1), wide)
    weights = [rows(count, k, dtype, device, 2 + i) * k**-0.5 for i, count in enumerate(counts)]
    biases = [rows(1, count, dtype, device, 12 + i)[0] for i, count in enumerate(counts)] if bias else None
    stream = _within(rows(tokens, counts[0], dtype, device, 22), wide) if residual else None
    factors = rows(1, k, dtype, device, 23)[0] if norm else None
    got = few_rows(
        x, weights, biases, residual=stream, norm=factors, eps=EPS, unit_offset=unit_offset, gated=gated, tile=tile,
        weights_settled=settled,
    )  # fmt: skip
    assert got.dtype is dtype
    assert_close("product", got, *wanted(x, weights, biases, stream, factors, unit_offset, gated))


def _within(x: torch.Tensor, more: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, more), value=torch.nan)[:, : x.shape[1]]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("tokens", "norm", "kind", "k"),
    pairwise([1, 2, 7, 8, 9, 16], [False, True], ["plain", "gated", "three", "residual"], [64, 192, 448]),
)
def test_products(tokens, norm, kind, k):
    counts = {"gated": [50, 50], "three": [33, 16, 5]}.get(kind, [37])
    check(tokens, k, counts, norm=norm, gated=kind == "gated", bias=kind == "three", residual=kind == "residual")


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["gated", "three", "residual"])
@pytest.mark.parametrize("tokens", [3, 12])
def test_fp16(tokens, kind):
    counts = {"gated": [20, 20], "three": [33, 16, 5]}.get(kind, [37])
    check(tokens, 256, counts, FP16, gated=kind == "gated", bias=kind == "three", residual=kind == "residual")


@pytest.mark.interpreter
@pytest.mark.parametrize("tile", [FewRowsTile(1, 4, 1), FewRowsTile(4, 1, 3), FewRowsTile(4, 2, 9), FewRowsTile(8, 2, 2)])
def test_tiles(tile):
    """More warps than parts of the columns, fewer rounds than are held, and the other way round."""
    for tokens in (4, 11):
        check(tokens, 384, [40], norm=True, residual=True, tile=tile)


@pytest.mark.interpreter
def test_norms_that_multiply_by_one_more():
    check(5, 128, [24], norm=True, unit_offset=True)


@pytest.mark.interpreter
def test_rows_within_longer_ones():
    check(5, 128, [24], residual=True, wide=24)
    check(5, 128, [24], norm=True, wide=8, settled=False)


def test_without_the_l1_cache_that_is_asked_for_others_are_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, 128, dtype=BF16)
    assert takes(x, [x], TWO) and takes(x, [x], TWO, asks_for_l1=True)
    monkeypatch.setattr(few_rows_module, "is_known_version", lambda: False)
    assert takes(x, [x], TWO) and not takes(x, [x], TWO, asks_for_l1=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(17, 128, dtype=BF16)}, "T up to 16"),
        ({"x": torch.zeros(2, 100, dtype=BF16)}, "a multiple of 64"),
        ({"x": torch.zeros(2, 128)}, "bf16 or fp16"),
        ({"x": torch.zeros(2, 132, dtype=BF16)[:, :128]}, "whole 16 bytes"),
        ({"weights": [torch.zeros(8, 64, dtype=BF16)]}, r"must be \[N, 128\]"),
        ({"biases": []}, "a bias for each"),
        ({"biases": [torch.zeros(3, dtype=BF16)]}, "bias"),
        ({"norm": torch.ones(128)}, "norm"),
        ({"residual": torch.zeros(2, 7, dtype=BF16)}, "residual"),
        ({"gated": True}, "gated"),
    ],
)
def test_bad_arguments(change, text):
    arguments = {"x": torch.zeros(2, 128, dtype=BF16), "weights": [torch.zeros(8, 128, dtype=BF16)], **change}
    with pytest.raises(ValueError, match=text):
        few_rows(**arguments, tile=TWO)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2, 5, 8, 16])
@pytest.mark.parametrize("k", [576, 896, 1024, 2560, 3072])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_on_a_gpu(tokens: int, k: int, dtype: torch.dtype) -> None:
    normalised = dtype is BF16
    for counts, gated in (([2000, 250, 250], False), ([2000, 2000], True), ([1000], False)):
        norm = normalised and len(counts) > 1
        tile = few_rows_tile(HOPPER, 2, tokens, k, sum(counts), gated, norm)
        assert tile is not None
        options = {"gated": gated, "bias": not gated, "residual": len(counts) == 1, "tile": tile, "device": "cuda"}
        check(tokens, k, counts, dtype, norm=norm, unit_offset=k == 896, **options)
