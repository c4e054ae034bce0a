"""Products of few tokens with several weights in one kernel against `torch.nn.functional.linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.layer import configs, matvec, reference
from hf_fastattn.kernels.layer.configs import BUCKETS, HOPPER, MEASURED, ProductTile, beats_cublas, product_tile
from hf_fastattn.kernels.layer.split_sums import SplitSums
from tests.kernels.cases import assert_close
from tests.kernels.layer.test_norm import rows
from tests.tools.combinations import pairwise

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = (1, 2, 3, 8, 16)


def check(
    tokens: int,
    k: int,
    counts: Sequence[int],
    dtype: torch.dtype = BF16,
    *,
    bias: bool = False,
    residual: bool = False,
    gated: bool = False,
    strided: bool = False,
    repeats: int = 1,
    device: str = "cpu",
    weight_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """One launch against PyTorch; more repeats must give the same bits.

    Args:
        counts: rows of each weight.
        weight_dtype: of weights, biases and residual, if it is another than that of x.
        options: keywords of the operation.
    """
    x = rows(tokens, k, dtype, device, 1, strided)
    wide = weight_dtype or dtype
    weights = [rows(count, k, wide, device, 2 + i) * k**-0.5 for i, count in enumerate(counts)]
    extras: dict[str, Any] = {}
    if bias:
        extras["biases"] = [rows(1, count, wide, device, 12 + i)[0] for i, count in enumerate(counts)]
    if residual:
        extras["residual"] = rows(tokens, counts[0], wide, device, 22, strided)

    def run(module: Any, target: torch.dtype | None, **own: Any) -> Sequence[Tensor]:
        x_, weights_, extras_ = (x, weights, extras) if target is None else _to((x, weights, extras), target)
        if gated:
            return (module.gate_up_silu(x_, *weights_, **extras_, **own),)
        return module.matvec(x_, weights_, **extras_, **own)

    got = run(matvec, None, **options)
    again = [run(matvec, None, **options) for _ in range(repeats - 1)]
    names = ("first", "second", "third")
    plains, wants = run(reference, None), run(reference, torch.float64)
    for i, (ours, plain, want) in enumerate(zip(got, plains, wants, strict=True)):
        assert ours.dtype == (wide if residual else dtype)
        assert_close(f"{names[i]} product", ours, plain, want)
        assert all(torch.equal(ours, other[i]) for other in again)


def _to(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype)
    if isinstance(tree, dict):
        return {name: _to(value, dtype) for name, value in tree.items()}
    return [_to(value, dtype) for value in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "tokens", "kind"), pairwise([BF16, FP16], [1, 3, 20], ["bias", "residual", "gated"]))
def test_weights_of_autocast(dtype, tokens, kind):
    """fp32 weights are rounded to the dtype of x, and an fp32 residual stays one."""
    counts = {"bias": (33, 64, 70), "residual": (70,), "gated": (48, 48)}[kind]
    check(tokens, 1000, counts, dtype, weight_dtype=FP32, **{kind: True})


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_wide_residual(tokens):
    check(tokens, 96, (40,), BF16, residual=True, repeats=2, weight_dtype=FP32)
    x, weight, residual = rows(tokens, 96, BF16, "cpu", 1), rows(40, 96, BF16, "cpu", 2), rows(tokens, 40, FP32, "cpu", 3)
    (got,) = matvec.matvec(x, [weight], residual=residual)
    (plain,) = reference.matvec(x, [weight], residual=residual)
    (want,) = reference.matvec(x.double(), [weight.double()], residual=residual.double())
    assert got.dtype == FP32
    assert_close("product", got, plain, want)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "tokens", "shape"),
    pairwise([BF16, FP16, FP32], TOKENS, [(64, (16,)), (896, (64, 8, 8)), (1000, (33, 1)), (8, (5, 63, 2))]),
)
def test_shapes(dtype, tokens, shape):
    k, counts = shape
    check(tokens, k, counts, dtype, bias=len(counts) > 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"residual": True},
        {"residual": True, "bias": True, "strided": True},
        {"strided": True, "weights_settled": True},
    ],
)
def test_options(tokens, options):
    check(tokens, 520, (40,), **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("tokens", TOKENS)
def test_gate_up_silu(dtype, tokens):
    check(tokens, 264, (65, 65), dtype, gated=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("vector", [2, 8])
def test_neighbours_added_at_once(dtype, vector):
    tile = ProductTile(4, 128, 4, 2, vector=vector)
    check(1, 520, (40, 9, 3), dtype, bias=True, tile=tile)
    check(1, 256, (41,), dtype, residual=True, tile=tile)
    check(1, 300, (65, 65), dtype, gated=True, tile=tile)


@pytest.mark.interpreter
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("k", "split"), [(512, 2), (512, 8), (500, 3), (96, 8)])
def test_split(gated, k, split):
    sums = SplitSums(torch.device("cpu"))
    tile = ProductTile(32, 64, 4, 2, split)
    check(5, k, (70, 70) if gated else (70, 9, 40), gated=gated, sums=sums, tile=tile, repeats=2, bias=not gated)
    assert not sums.arrived.any()


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [17, 64])
def test_more_tokens(tokens):
    check(tokens, 136, (48, 16), bias=True)


@pytest.mark.interpreter
@pytest.mark.parametrize(("tokens", "counts"), [(0, (16, 8)), (1, (16, 0)), (2, (0, 16, 3))])
def test_nothing_to_do(tokens, counts):
    check(tokens, 64, counts)


@pytest.mark.interpreter
def test_outputs_are_views_of_one_tensor():
    x, weights = torch.randn(2, 32), [torch.randn(n, 32) for n in (8, 4, 4)]
    outs = matvec.matvec(x, weights)
    assert [out.shape[1] for out in outs] == [8, 4, 4]
    assert len({out.untyped_storage().data_ptr() for out in outs}) == 1


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    x, w = torch.zeros(2, 32), torch.zeros(8, 32)
    for wrong, message in (
        ((torch.zeros(65, 32), [w]), "T up to 64"),
        ((x, [w] * 4), "expected 1 to 3"),
        ((x, [w[:, :16]]), "is not"),
        ((x, [w.half()]), "float16"),
        ((x, [w], [w[0]]), "bias"),
        ((x, [w, w], [w[:, 0]]), "a bias for each or none"),
    ):
        with pytest.raises(ValueError, match=message):
            matvec.matvec(*wrong)
    with pytest.raises(ValueError, match="single weight"):
        matvec.matvec(x, [w, w], residual=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="one shape"):
        matvec.gate_up_silu(x, w, w[:4])


@pytest.mark.interpreter
def test_tiles():
    """Every table entry and default is one that the kernels take."""
    shapes = [(arch, bucket, k, n, gated) for arch in (80, 90, 100) for bucket in BUCKETS for gated in (False, True)
              for k in (8, 896, 4096, 11008, 14336) for n in (2, 896, 6144, 28672, 128256)]  # fmt: skip
    tiles = [product_tile(arch, 2, bucket, k, n, gated) for arch, bucket, k, n, gated in shapes]
    for (_, bucket, *_), tile in [*zip(shapes, tiles, strict=True), *MEASURED.items()]:
        assert all(not number & (number - 1) for number in (tile.block_n, tile.block_k, tile.warps, tile.vector))
        assert tile.block_n * tile.block_k <= 32_768 and (tile.split if bucket == 1 else tile.vector) == 1
        assert bucket == 1 or (tile.block_n >= 16 and tile.block_k >= 16)


# Llama-3-8B on an H200, bf16: (tokens, K, rows, gated) -> the quickest of the tiles tried, or one within 1% of it
QUICKEST = {
    (1, 4096, 6144, False): ProductTile(4, 2048, 8, 2),
    (1, 4096, 4096, False): ProductTile(2, 2048, 8, 2),
    (1, 4096, 28672, True): ProductTile(2, 2048, 8, 2, vector=8),
    (1, 14336, 4096, False): ProductTile(4, 2048, 4, 2),
    (1, 4096, 128256, False): ProductTile(4, 2048, 8, 2),
    (3, 4096, 6144, False): ProductTile(32, 256, 4, 3, split=2),
    (16, 4096, 4096, False): ProductTile(64, 128, 4, 4, split=4),
    (16, 4096, 28672, True): ProductTile(64, 128, 4, 2),
    (5, 14336, 4096, False): ProductTile(64, 128, 4, 4, split=4),
    (16, 4096, 128256, False): ProductTile(64, 128, 4, 4),
    (64, 4096, 4096, False): ProductTile(64, 128, 4, 4, split=2),
    (64, 4096, 28672, True): ProductTile(64, 64, 4, 3),
    (64, 14336, 4096, False): ProductTile(64, 128, 4, 4, split=2),
}


def test_the_rules_choose_what_was_quickest(monkeypatch):
    measured = dict(MEASURED)
    monkeypatch.setattr(configs, "MEASURED", {})
    choose = product_tile.__wrapped__
    for (tokens, k, total, gated), tile in QUICKEST.items():
        assert choose(HOPPER, 2, tokens, k, total, gated) == tile, (tokens, k, total)
    for (arch, bucket, k, total), tile in measured.items():
        assert choose(arch, 2, bucket, k, total, False) != tile, "the table is for exceptions"


def test_where_cublas_is_as_quick():
    # o, down, lm_head and gate with up of Llama-3-8B at 64 tokens
    shapes = [(4096, 4096, 1), (14336, 4096, 1), (4096, 128256, 1), (4096, 28672, 2)]
    assert [beats_cublas(HOPPER, 2, 64, *shape) for shape in shapes] == [False, True, False, True]
    assert all(beats_cublas(arch, size, 16, *shape) for arch in (80, 90) for size in (2, 4) for shape in shapes)
    assert not any(beats_cublas(arch, size, 17, *shape) for arch, size in ((80, 2), (80, 4)) for shape in shapes)
    assert all(beats_cublas(HOPPER, 4, 64, *shape) for shape in shapes)
    assert not beats_cublas(HOPPER, 2, 65, 14336, 4096, 1)
    # o and down of Qwen3-0.6B
    assert not beats_cublas(HOPPER, 2, 64, 2048, 1024, 1) and not beats_cublas(HOPPER, 2, 64, 3072, 1024, 1)
    assert beats_cublas(HOPPER, 2, 16, 2048, 1024, 1)
    # An adapter beside cuBLAS would be launches of its own; where the tiles were not measured, it is that still.
    assert beats_cublas(HOPPER, 2, 64, 4096, 4096, 1, adapted=True)
    assert not any(beats_cublas(arch, size, 17, *shapes[0], adapted=True) for arch, size in ((80, 2), (80, 4)))


@pytest.mark.interpreter
@pytest.mark.parametrize("k", [4096, 14336])
@pytest.mark.parametrize("tokens", [1, 8])
def test_long_sums_in_fp32(tokens, k, monkeypatch):
    """With `tl.dot` adding one product after the other, as it does on a GPU in fp32."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def chained(self, a, b, acc, *options):
        total = acc.data.astype(np.float32)
        for column in range(a.data.shape[1]):
            total = total + a.data[:, column, None] * b.data[None, column]
        return TensorHandle(total, acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", chained)
    check(tokens, k, (32,), FP32)


# Shapes of Llama-3-8B, Qwen2.5-0.5B and Llama-2-7B; then odd ones.
SWEEP = {
    "qkv": (4096, (4096, 1024, 1024), BF16, {"weights_settled": True}),
    "qkv, fp32": (4096, (4096, 1024, 1024), FP32, {"weights_settled": True}),
    "qkv, bias": (896, (896, 128, 128), FP16, {"bias": True}),
    "down": (14336, (4096,), BF16, {"residual": True, "weights_settled": True}),
    "down, fp32": (14336, (4096,), FP32, {"residual": True}),
    "down, 11008": (11008, (4096,), FP16, {"residual": True, "strided": True}),
    "down, of two ranks": (7168, (4096,), BF16, {"weights_settled": True}),
    "down, of two ranks, 70B": (14336, (8192,), BF16, {"weights_settled": True}),
    "gate, up": (4096, (14336, 14336), BF16, {"gated": True, "weights_settled": True}),
    "gate, up, 896": (896, (4864, 4864), FP16, {"gated": True}),
    "odd": (1000, (1001, 63, 1), BF16, {"bias": True}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SWEEP)
def test_sweep(name):
    k, counts, dtype, options = SWEEP[name]
    sums = SplitSums(torch.device("cuda"))
    for tokens in (*TOKENS, 17, 64):
        check(tokens, k, counts, dtype, sums=sums, repeats=2, device="cuda", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_split_sweep(gated):
    sums = SplitSums(torch.device("cuda"))
    counts = (1536, 1536) if gated else (1536, 256, 256)
    for tokens in (2, 16, 64):
        for split in (2, 5, 8):
            tile = ProductTile(32, 128, 4, 4, split)
            check(tokens, 8960, counts, gated=gated, sums=sums, tile=tile, repeats=10, device="cuda")
    assert not sums.arrived.any()


@pytest.mark.gpu
def test_replayed_with_overlap():
    """A chain of launches in a captured graph, each of which reads what the one before wrote."""
    x, w = rows(1, 4096, BF16, "cuda", 1), rows(4096, 4096, BF16, "cuda", 2) * 4096**-0.5

    def chain(x: Tensor) -> Tensor:
        for _ in range(20):
            (x,) = matvec.matvec(x, [w], weights_settled=True)
        return x

    want = chain(x).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x)
    for _ in range(10):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)
    w.neg_()
    w[0] += 1
    graph.replay()
    assert torch.equal(got, chain(x)), "weights changed in place are seen by the next replay"
