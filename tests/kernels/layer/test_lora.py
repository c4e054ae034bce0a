"""LoRA inside the launch of a product, against PEFT's steps in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.layer import matvec, reference
from hf_fastattn.kernels.layer.configs import ProductTile
from hf_fastattn.kernels.layer.lora import AT_ONCE, Adapter, LoraSums, LoraTile, Members, lora_tile
from hf_fastattn.kernels.layer.lora_programs import MISSING
from hf_fastattn.kernels.layer.split_sums import SplitSums
from tests.kernels.cases import assert_close
from tests.kernels.layer.test_norm import rows
from tests.tools.combinations import in_turn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of x and weights, and of A and B; the first is what PEFT makes of a 16-bit model.
DTYPES = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32), (FP32, BF16)]


def check(
    tokens: int,
    k: int,
    counts: Sequence[int],
    ranks: Sequence[int],
    dtype: torch.dtype = BF16,
    adapter_dtype: torch.dtype = FP32,
    *,
    bias: bool = False,
    residual: bool = False,
    gated: bool = False,
    strided: bool = False,
    repeats: int = 1,
    device: str = "cpu",
    **options: Any,
) -> None:
    """One launch against PyTorch; more repeats must give the same bits.

    Args:
        counts: rows of each weight.
        ranks: of each adapter, 0 for none.
        options: keywords of the operation.
    """
    x = rows(tokens, k, dtype, device, 1, strided)
    weights = [rows(count, k, dtype, device, 2 + i) * k**-0.5 for i, count in enumerate(counts)]
    biases = [rows(1, count, dtype, device, 12 + i)[0] for i, count in enumerate(counts)] if bias else None
    added = rows(tokens, counts[0], dtype, device, 22, strided) if residual else None
    adapters = [
        Adapter(
            rows(rank, k, adapter_dtype, device, 32 + i) * k**-0.5, rows(count, rank, adapter_dtype, device, 42 + i), 0.5 + i
        )
        if rank
        else None
        for i, (rank, count) in enumerate(zip(ranks, counts, strict=True))
    ]

    def ours() -> Sequence[Tensor]:
        if gated:
            return (matvec.gate_up_silu(x, *weights, lora=adapters, **options),)
        return matvec.matvec(x, weights, biases, residual=added, lora=adapters, **options)

    def theirs(wide: torch.dtype | None) -> Sequence[Tensor]:
        def cast(tensor: Tensor) -> Tensor:
            return tensor if wide is None else tensor.to(wide)

        outs = reference.matvec(cast(x), [cast(w) for w in weights], biases and [cast(b) for b in biases])
        outs = tuple(
            out if one is None else reference.low_rank(cast(x), out, cast(one.a), cast(one.b), one.scale)
            for out, one in zip(outs, adapters, strict=True)
        )
        if gated:
            return (reference.silu_and_mul(*outs),)
        return outs if added is None else [out + cast(added) for out in outs]

    got = ours()
    again = [ours() for _ in range(repeats - 1)]
    for i, (out, plain, want) in enumerate(zip(got, theirs(None), theirs(torch.float64), strict=True)):
        assert out.dtype == dtype
        assert_close(f"product {i}", out, plain, want)
        assert all(torch.equal(out, other[i]) for other in again)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtypes", "tokens"), [*((dtypes, tokens) for dtypes in DTYPES for tokens in (1, 8)), *in_turn(DTYPES, (2, 64))]
)
def test_dtypes(dtypes, tokens):
    dtype, adapter_dtype = dtypes
    check(tokens, 264, (24, 9, 8), (16, 4, 40), dtype, adapter_dtype, bias=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("counts", "ranks"), [((33,), (8,)), ((24, 8, 8), (4, 0, 4)), ((5, 63), (0, 3))])
def test_shapes(tokens, counts, ranks):
    check(tokens, 96, counts, ranks, residual=len(counts) == 1)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES[:2])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("ranks", [(16, 16), (4, 9), (0, 8)])
def test_gate_up_silu(dtype, adapter_dtype, tokens, ranks):
    check(tokens, 136, (33, 33), ranks, dtype, adapter_dtype, gated=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("rank", [1, 100])
def test_ranks(tokens, rank):
    check(tokens, 512, (40, 9), (rank, 8))
    check(tokens, 520, (40,), (rank,), strided=True, residual=True, weights_settled=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("k", "split"), [(512, 2), (500, 3)])
def test_beside_split_products(gated, k, split):
    sums, counters = SplitSums(torch.device("cpu")), LoraSums(torch.device("cpu"))
    counts = (70, 70) if gated else (70, 9, 40)
    options = {"sums": sums, "lora_sums": counters, "tile": ProductTile(32, 64, 4, 2, split)}
    check(5, k, counts, (16,) * len(counts), gated=gated, repeats=2, bias=not gated, **options)
    assert not sums.arrived.any()


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_parts(tokens, parts):
    check(tokens, 500, (40, 9), (16, 5), lora_tile=LoraTile(32, parts))


def stacked(members: Sequence[tuple[int, Adapter]]) -> Adapter:
    """Numbered adapters of one weight as one."""
    ranks = torch.tensor([one.a.shape[0] for _, one in members])
    device = members[0][1].a.device
    scales = torch.tensor([one.scale for _, one in members]).repeat_interleave(ranks).to(device)
    numbers = torch.tensor([number for number, _ in members], dtype=torch.int32).repeat_interleave(ranks).to(device)
    a, b = torch.cat([one.a for _, one in members]), torch.cat([one.b for _, one in members], 1)
    return Adapter(a, b, 1.0, Members(scales, numbers))


def check_stacked(
    tokens: int, k: int, counts: Sequence[int], ranks: Sequence[Sequence[int]], numbers: Sequence[int],
    held: torch.dtype = FP32, dtype: torch.dtype = BF16, *, gated: bool = False, device: str = "cpu", **options: Any,
) -> None:  # fmt: skip
    """Adapters of `ranks` for each weight, and each token with that of its number (-1: none), or all of number 0.

    Args:
        ranks: of the adapters of each weight; the first has the number 0, and so on; 0 for one that is not there.
    """
    x = rows(tokens, k, dtype, device, 1)
    weights = [rows(count, k, dtype, device, 2 + i) * k**-0.5 for i, count in enumerate(counts)]

    def adapter(rank: int, count: int, scale: float, seed: int) -> Adapter:
        return Adapter(rows(rank, k, held, device, seed) * k**-0.5, rows(count, rank, held, device, seed + 30), scale)

    members = [
        [
            (number, adapter(rank, count, scale, 30 + 9 * i + number))
            for number, (rank, scale) in enumerate(zip(wanted, (2.0, -0.5, 1.5), strict=False))
            if rank
        ]
        for i, (count, wanted) in enumerate(zip(counts, ranks, strict=True))
    ]
    mine = torch.tensor(numbers, dtype=torch.int32, device=device)
    lora = [stacked(held) if held else None for held in members]

    def theirs(cast: Any) -> list[Tensor]:
        outs = list(reference.matvec(cast(x), [cast(w) for w in weights]))
        for i, held in enumerate(members):
            for number, one in held:
                added = reference.low_rank(cast(x), outs[i], cast(one.a), cast(one.b), one.scale)
                outs[i] = torch.where((mine == number)[:, None], added, outs[i])
        return [reference.silu_and_mul(*outs)] if gated else outs

    options |= {"lora": lora, "lora_numbers": mine}
    got = (matvec.gate_up_silu(x, *weights, **options),) if gated else matvec.matvec(x, weights, **options)
    for out, plain, want in zip(got, theirs(lambda t: t), theirs(lambda t: t.double()), strict=True):
        assert_close("stacked", out, plain, want)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("counts", "ranks", "gated", "held"),
    [
        ((24, 9, 8), ((16, 4), (0, 0), (8, 0)), False, FP32),
        ((24, 9, 8), ((16, 4), (0, 0), (8, 0)), False, BF16),
        ((33, 33), ((4, 4, 30), (9, 0, 2)), True, FP32),
        ((40,), ((100, 28),), False, BF16),
    ],
)
def test_stacked(counts, ranks, gated, held):
    """Each token has its own adapter's addition, and those without one none."""
    for numbers in ([0], [1], [-1], [0, 1, -1, 1, 2]):
        check_stacked(len(numbers), 264, counts, ranks, numbers, held, gated=gated)
    check_stacked(64, 520, counts, ranks, [-1, 0, 1, 2] * 16, held, gated=gated, weights_settled=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_stack_is_the_sum(tokens):
    """Adapters of one number are all added."""
    k, dtype = 264, FP32
    x, w = rows(tokens, k, dtype, "cpu", 1), rows(40, k, dtype, "cpu", 2) * k**-0.5
    members = [
        (0, Adapter(rows(r, k, dtype, "cpu", r) * k**-0.5, rows(40, r, dtype, "cpu", 9 + r), s))
        for r, s in ((4, 2.0), (16, 0.5))
    ]
    zeros = torch.zeros(tokens, dtype=torch.int32)
    (out,) = matvec.matvec(x, [w], lora=[stacked(members)], lora_numbers=zeros)

    def added(cast: Any) -> Tensor:
        y = cast(x) @ cast(w).T
        for _, one in members:
            y = reference.low_rank(cast(x), y, cast(one.a), cast(one.b), one.scale)
        return y

    assert_close("sum", out, added(lambda t: t), added(lambda t: t.double()))


@pytest.mark.interpreter
def test_sums_of_many_launches():
    """More than are made at once; each launch has its own, and none is there."""
    sums = LoraSums(torch.device("cpu"))
    seen = [sums.take(size) for size in (96, AT_ONCE // 3, AT_ONCE // 2, AT_ONCE, AT_ONCE + 16)]
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel()) for tensor in seen)
    assert all(first[1] <= second[0] for first, second in pairwise(ranges))
    assert all((tensor == MISSING.value).all() for tensor in seen)


@pytest.mark.interpreter
def test_a_nan_of_the_weights_is_no_missing_sum():
    """Nor is the very NaN that stands for one: whoever waits for sums would wait for ever."""
    a, b, x = torch.ones(4, 32), torch.ones(8, 4), torch.ones(1, 32)
    for bits in (MISSING.value, 0x7FFFFFFF):
        a.view(torch.int32)[0, 0] = bits
        for tokens in (1, 3):
            (y,) = matvec.matvec(x.expand(tokens, -1), [torch.ones(8, 32)], lora=[Adapter(a, b, 1.0)])
            assert y.isnan().all()


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    x, w = torch.zeros(2, 32), torch.zeros(8, 32)
    a, b = torch.zeros(4, 32), torch.zeros(8, 4)
    for wrong, message in (
        ([], "adapters"),
        ([None], "not None"),
        ([Adapter(a[:, :16], b, 1.0)], "must be"),
        ([Adapter(a, b.T, 1.0)], "must be"),
        ([Adapter(torch.zeros(200, 32), torch.zeros(8, 200), 1.0)], "to 128"),
        ([Adapter(a, b.half(), 1.0)], "float16"),
        ([Adapter(a, torch.zeros(4, 8).T, 1.0)], "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            matvec.matvec(x, [w], lora=wrong)
    one, numbers = stacked([(0, Adapter(a, b, 1.0))]), torch.zeros(2, dtype=torch.int32)
    for lora, given, message in (
        ([one], None, "all be stacked"),
        ([Adapter(a, b, 1.0)], numbers, "all be stacked"),
        ([one], numbers[:1], "must be"),
        ([one], numbers.long(), "int32"),
        ([Adapter(a, b, 1.0, Members(torch.ones(3), numbers))], numbers, "scales"),
    ):
        with pytest.raises(ValueError, match=message):
            matvec.matvec(x, [w], lora=lora, lora_numbers=given)


def test_every_part_is_worth_a_program():
    for block_t in (1, 16, 64):
        for k in (8, 896, 2048, 14336):
            for rank in (16, 32, 64, 128):
                tile = lora_tile(block_t, k, rank)
                assert not tile.block_k & (tile.block_k - 1) and tile.block_k >= 16 and 1 <= tile.parts <= 16


# Shapes of Llama-3.2-1B and Qwen2.5-0.5B; then odd ones.
SWEEP: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "qkv": (2048, (2048, 512, 512), (16, 16, 16), {"weights_settled": True}),
    "q and v": (896, (896, 128, 128), (8, 0, 8), {"bias": True}),
    "down": (8192, (2048,), (16,), {"residual": True, "weights_settled": True}),
    "gate, up": (2048, (8192, 8192), (16, 16), {"gated": True, "weights_settled": True}),
    "ragged": (1000, (1001, 63, 1), (4, 100, 17), {"bias": True}),
    "rank 128": (896, (4864, 4864), (128, 128), {"gated": True}),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype", "adapter_dtype"),
    [*((name, BF16, FP32) for name in SWEEP), ("qkv", BF16, BF16), ("q and v", FP16, FP32), ("down", FP32, FP32)],
)
def test_sweep(name, dtype, adapter_dtype):
    k, counts, ranks, options = SWEEP[name]
    sums, counters = SplitSums(torch.device("cuda")), LoraSums(torch.device("cuda"))
    for tokens in (1, 2, 16, 64):
        check(
            tokens, k, counts, ranks, dtype, adapter_dtype,
            sums=sums, lora_sums=counters, repeats=5, device="cuda", **options,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8])
def test_replayed_with_overlap(tokens):
    """A chain of launches in a captured graph: counters are zero in every replay, weights those of the moment."""
    k, rank = 2048, 16
    x, w = rows(tokens, k, BF16, "cuda", 1), rows(k, k, BF16, "cuda", 2) * k**-0.5
    adapter = Adapter(rows(rank, k, FP32, "cuda", 3) * k**-0.5, rows(k, rank, FP32, "cuda", 4) * rank**-0.5, 1.0)

    def chain(x: Tensor) -> Tensor:
        counters, sums = LoraSums(x.device), SplitSums(x.device)
        for _ in range(100):
            (x,) = matvec.matvec(x, [w], weights_settled=True, lora=[adapter], lora_sums=counters, sums=sums)
            x = x * 0.5
        return x

    want = chain(x).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x)
    for _ in range(10):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)
    adapter.a.neg_()
    graph.replay()
    assert torch.equal(got, chain(x)) and not torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("held", [FP32, BF16])
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_stacked_on_a_gpu(tokens, held):
    numbers = [number % 3 - 1 for number in range(tokens)]
    check_stacked(tokens, 2048, (2048, 512, 512), ((16, 16), (16, 0), (8, 4)), numbers, held, device="cuda")
    check_stacked(tokens, 2048, (8192, 8192), ((16, 16), (16, 16)), numbers, held, gated=True, device="cuda")
