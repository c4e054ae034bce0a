"""Products with quantised weights on a CUDA device, at the widths of models, and with weights that the libraries made."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.quantised import products, reference
from hf_fastattn.quantised.modules import quantised_linear
from tests.kernels.cases import assert_close
from tests.kernels.layer.test_norm import rows
from tests.kernels.quantised.test_products import check
from tests.kernels.quantised.weight_cases import KINDS, of_kind

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1024, 3072, 4096, 14336])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_one_token(kind: str, k: int, dtype: torch.dtype) -> None:
    if kind == "tiled" and dtype is not BF16:
        pytest.skip("tinygemm multiplies in bf16 alone")
    weights = [of_kind(kind, count, k, "cuda", seed) for seed, count in enumerate((4096, 1024, 1000))]
    check(1, weights, dtype, bias=True, weights_settled=True)
    check(1, weights[:1], dtype, residual=dtype)
    check(1, [of_kind(kind, 1001, k, "cuda", seed) for seed in range(2)], dtype, gated=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "int4"])
def test_weights_of_the_library(kind: str) -> None:
    """Read as the library reads them: within twice its own error against fp64."""
    linear = torch.nn.Linear(4096, 1024, bias=False, device="cuda", dtype=BF16)
    if kind.startswith("int"):
        quantization = pytest.importorskip("torchao.quantization")
        config = (
            quantization.Int8WeightOnlyConfig(set_inductor_config=False)
            if kind == "int8"
            else quantization.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
        )
        quantization.quantize_(linear, config)
    else:
        bnb = pytest.importorskip("bitsandbytes")
        linear = bnb.nn.Linear4bit(4096, 1024, bias=False, compute_dtype=BF16, quant_type=kind)
        linear = linear.to(BF16).to("cuda").eval()
    held = quantised_linear(linear, torch.device("cuda", torch.cuda.current_device()), BF16)
    assert held is not None
    x = rows(1, 4096, BF16, "cuda", 1)
    with torch.no_grad():
        library = linear(x)
    (ours,) = products.matvec(x, [held.weight])
    (exact,) = reference.matvec(x.double(), [held.weight])
    assert_close("product", ours, library, exact)
    # Far less than any other reading of the storage would give.
    assert (library.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kind", ["nf4", "nf4 flat", "fp4", "tiled"])
@pytest.mark.parametrize("k", [896, 1024, 4096, 14336])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 16])
def test_several_tokens(kind: str, k: int, tokens: int) -> None:
    if kind == "tiled" and k % 1024:
        pytest.skip("tinygemm pads such weights")
    for dtype in (BF16,) if kind == "tiled" else (BF16, FP16):
        weights = [of_kind(kind, count, k, "cuda", seed) for seed, count in enumerate((4096, 1024, 1000))]
        check(tokens, weights, dtype, bias=True, weights_settled=True)
        check(tokens, weights[:1], dtype, residual=dtype)
        check(tokens, [of_kind(kind, 1001, k, "cuda", seed) for seed in range(2)], dtype, gated=True)
