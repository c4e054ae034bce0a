"""Products with quantised weights in one kernel against `torch.nn.functional.linear` with the weights dequantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hf_fastattn.kernels.quantised import products, reference
from hf_fastattn.kernels.quantised.weights import QuantisedWeight
from tests.kernels.cases import assert_close
from tests.kernels.layer.test_norm import rows
from tests.kernels.quantised.weight_cases import KINDS, block_codes, of_kind, row_ints, tiled_ints
from tests.tools.combinations import pairwise

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(
    tokens: int,
    weights: Sequence[QuantisedWeight],
    dtype: torch.dtype = BF16,
    *,
    bias: bool = False,
    residual: torch.dtype | None = None,
    gated: bool = False,
    **options: Any,
) -> None:
    """One launch against PyTorch in the same dtype, both against fp64, and twice the same bits."""
    device = str(reference.dequantised(weights[0], FP32).device)
    x = rows(tokens, weights[0].columns, dtype, device, 1)
    extras: dict[str, Any] = {}
    if bias:
        extras["biases"] = [rows(1, weight.rows, dtype, device, 12 + i)[0] for i, weight in enumerate(weights)]
    if residual is not None:
        extras["residual"] = rows(tokens, weights[0].rows, residual, device, 22)
    wide = {name: [one.double() for one in held] if name == "biases" else held.double() for name, held in extras.items()}
    if gated:
        got, again = ((products.gate_up_silu(x, *weights, **options),) for _ in range(2))
        plains, wants = (reference.gate_up_silu(x, *weights),), (reference.gate_up_silu(x.double(), *weights),)
    else:
        got, again = (products.matvec(x, weights, **extras, **options) for _ in range(2))
        plains, wants = reference.matvec(x, weights, **extras), reference.matvec(x.double(), weights, **wide)
    for number, (ours, other, plain, want) in enumerate(zip(got, again, plains, wants, strict=True)):
        assert ours.dtype == (residual or dtype) and torch.equal(ours, other)
        assert_close(f"product {number}", ours, plain, want)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    pairwise(KINDS, [BF16, FP16, FP32], [(1024, (9,)), (512, (12, 5, 8)), (1024, (10, 9))]),
)
def test_one_token(kind: str, dtype: torch.dtype, shape: tuple[int, tuple[int, ...]]) -> None:
    k, counts = shape
    k, dtype = (1024, BF16) if kind == "tiled" else (k, dtype)
    check(1, [of_kind(kind, count, k, seed=number) for number, count in enumerate(counts)], dtype, bias=len(counts) > 1)


@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "dtype", "tokens"), pairwise(["nf4", "nf4 flat", "fp4"], [BF16, FP16], [2, 5, 8, 9, 16]))
def test_several_tokens(kind: str, dtype: torch.dtype, tokens: int) -> None:
    weights = [of_kind(kind, count, 512, seed=number) for number, count in enumerate((16, 5, 20))]
    check(tokens, weights, dtype, bias=True)
    check(tokens, weights[:1], dtype, residual=FP32)
    check(tokens, [of_kind(kind, 19, 448, seed=number) for number in range(2)], dtype, gated=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(("tokens", "group", "k"), [(1, 256, 1024), (3, 128, 2048), (8, 1024, 1024), (11, 128, 1024)])
def test_tiles(tokens: int, group: int, k: int) -> None:
    weights = [tiled_ints(count, k, group, seed=number) for number, count in enumerate((16, 5, 21))]
    check(tokens, weights, bias=True)
    check(tokens, weights[2:], residual=FP32)
    check(tokens, [tiled_ints(21, k, group, seed=number) for number in range(2)], gated=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 3])
def test_x_at_odd_addresses(tokens: int) -> None:
    weight = of_kind("nf4", 9, 256)
    x = rows(tokens, 257, BF16, "cpu", 1)
    for given in (x[:, 1:], x[:, :-1]):
        assert torch.equal(products.matvec(given, [weight])[0], products.matvec(given.clone(), [weight])[0])


@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "dtype"), pairwise(KINDS, [BF16, FP16, FP32]))
def test_gate_up_silu(kind: str, dtype: torch.dtype) -> None:
    dtype = BF16 if kind == "tiled" else dtype
    check(1, [of_kind(kind, 11, 1024, seed=number) for number in range(2)], dtype, gated=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [BF16, FP32])
def test_a_residual(kind: str, residual: torch.dtype) -> None:
    check(1, [of_kind(kind, 24, 1024)], BF16, residual=residual, bias=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("k", "block"), [(96, 32), (192, 64), (768, 256), (1600, 64), (2304, 256)])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks(kind: str, k: int, block: int, nested: bool) -> None:
    check(1, [block_codes(9, k, kind, block, nested)], FP16)


@pytest.mark.interpreter
@pytest.mark.parametrize(("k", "scales"), [(48, FP32), (1040, BF16), (2304, FP32)])
def test_scales_of_rows(k: int, scales: torch.dtype) -> None:
    check(1, [row_ints(25, k, scales)], FP16)


@pytest.mark.interpreter
def test_what_is_refused() -> None:
    x, codes = torch.zeros(1, 128, dtype=BF16), block_codes(8, 128)
    for message, weights, given in (
        ("must be alike", [codes, row_ints(8, 128)], x),
        ("expected 1 to 3", [codes] * 4, x),
        ("T up to", [codes], torch.zeros(17, 128, dtype=BF16)),
        ("T up to", [block_codes(8, 128, block=32)], torch.zeros(2, 128, dtype=BF16)),
        ("T up to", [tiled_ints(8, 1024)], torch.zeros(1, 1024, dtype=FP16)),
        ("groups of 64 in 1024", [tiled_ints(8, 1024, 64)], torch.zeros(1, 1024, dtype=BF16)),
        ("groups of 128 in 896", [tiled_ints(8, 896)], torch.zeros(1, 896, dtype=BF16)),
        ("T up to", [codes], torch.zeros(1, 64, dtype=BF16)),
        ("blocks of 64 for 96", [block_codes(8, 96)], torch.zeros(1, 96, dtype=BF16)),
    ):
        with pytest.raises(ValueError, match=message):
            products.matvec(given, weights)
    with pytest.raises(ValueError, match="bias"):
        products.matvec(x, [codes], [torch.zeros(7)])
    with pytest.raises(ValueError, match="residual"):
        products.matvec(x, [codes], residual=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="one shape"):
        products.gate_up_silu(x, codes, block_codes(16, 128))
