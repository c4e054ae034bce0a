"""Products of one token with 4-bit codes by programs that hold x: their sums, and for which shapes these are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fastattn.kernels.launch import PROCESSORS
from hf_fastattn.kernels.quantised import products
from hf_fastattn.kernels.quantised.configs import FEWEST_HELD, codes_held_tile
from tests.kernels.quantised.test_products import check
from tests.kernels.quantised.weight_cases import block_codes, of_kind
from tests.tools.combinations import pairwise
from tests.tools.fake_driver import counting_driver
from tests.tools.targets import TARGETS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("nf4", "nf4 flat", "fp4", "fp4 flat")
# A layer of Llama-3-8B: q, k and v; o; gate and up. Then rows that are no whole tiles.
QKV, OUT, GATE_UP, ODD = (4096, 1024, 1024), (4096,), (14336, 14336), (4096, 1000, 1001)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that products launch from now on."""
    names, prepared = [], products.prepared

    def noted(kernel: Any) -> Any:
        names.append(kernel.__name__)
        return prepared(kernel)

    monkeypatch.setattr(products, "prepared", noted)
    return names


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes the kernel for 512 and for 1,024 columns, by two programs, and notes what is launched."""

    def tile(arch: int, k: int, tiles: int, processors: int) -> dict[str, int] | None:
        return {"WARPS": k // 256, "num_warps": k // 256} if k in (512, 1024) else None

    monkeypatch.setattr(products, "codes_held_tile", tile)
    monkeypatch.setattr(products, "processors_of", lambda device: 2)
    return launched(monkeypatch)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("kind", "dtype", "k", "counts"),
    pairwise(KINDS, [BF16, FP16], [512, 1024], [(9,), (80,), (33, 17, 24), (16, 31)]),
)
def test_rows(kind: str, dtype: torch.dtype, k: int, counts: tuple[int, ...], small: list[str]) -> None:
    """Fewer tiles than programs and several times as many; tiles of two weights follow each other in a program."""
    check(1, [of_kind(kind, count, k, seed=seed) for seed, count in enumerate(counts)], dtype, bias=len(counts) > 1)
    assert set(small) == {"codes_held_kernel"}


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gate_up_silu(kind: str, dtype: torch.dtype, small: list[str]) -> None:
    check(1, [of_kind(kind, 53, 512, seed=seed) for seed in range(2)], dtype, gated=True)
    assert set(small) == {"codes_held_kernel"}


@pytest.mark.interpreter
@pytest.mark.parametrize("residual", [BF16, FP32])
def test_a_residual(residual: torch.dtype, small: list[str]) -> None:
    check(1, [of_kind("nf4", 40, 512)], residual=residual, bias=True)
    assert set(small) == {"codes_held_kernel"}


@pytest.mark.interpreter
@pytest.mark.parametrize("block", [128, 512])
@pytest.mark.parametrize("nested", [False, True])
def test_blocks(block: int, nested: bool, small: list[str]) -> None:
    check(1, [block_codes(40, 1024, "nf4", block, nested)], FP16)
    assert set(small) == {"codes_held_kernel"}


@pytest.mark.interpreter
def test_what_other_kernels_take(small: list[str]) -> None:
    """More tokens, fp32, blocks of 32, and columns without a tile."""
    check(2, [of_kind("nf4", 20, 512)])
    check(1, [of_kind("nf4", 20, 512)], FP32)
    check(1, [block_codes(20, 512, block=32)])
    check(1, [of_kind("nf4", 20, 768)])
    assert small == 2 * ["codes_matrix_kernel"] + 4 * ["codes_row_kernel"] + 2 * ["codes_matrix_kernel"]


@pytest.mark.parametrize(
    ("rows", "gated", "taken"),
    [
        (QKV, False, True),
        (OUT, False, True),
        (GATE_UP, True, True),
        (ODD, False, True),
        # One tile more than the programs have in two rounds; a layer on each of two ranks; k or v alone.
        ((16 * (2 * PROCESSORS + 1),), False, False),
        ((2048, 512, 512), False, False),
        ((7168, 7168), True, False),
        ((1024,), False, False),
    ],
)
def test_where_it_is_quicker(rows: tuple[int, ...], gated: bool, taken: bool) -> None:
    """On Hopper by its launcher; other architectures were not measured, nor other numbers of columns."""
    weights = [of_kind("nf4", count, 4096) for count in rows]
    x = torch.zeros(1, 4096, dtype=BF16)
    for target, expected in (("sm_90", taken), ("sm_80", False), ("sm_100", False)):
        with counting_driver(TARGETS[target]) as fake:
            if gated:
                products.gate_up_silu(x, *weights)
            else:
                products.matvec(x, weights)
            launched = {kernel.__name__ for kernel in fake.launched}
        assert launched == {"codes_held_kernel" if expected else "codes_matrix_kernel"}
    for k in (2048, 3584, 14336):
        assert codes_held_tile(90, k, FEWEST_HELD, PROCESSORS) is None


def test_programs_without_a_tile() -> None:
    """Up to a quarter of them may wait for the others in the last round."""
    assert codes_held_tile(90, 4096, 3 * PROCESSORS - PROCESSORS // 4, PROCESSORS)
    assert not codes_held_tile(90, 4096, 3 * PROCESSORS - PROCESSORS // 4 - 1, PROCESSORS)
    assert codes_held_tile(90, 4096, FEWEST_HELD, 64) and not codes_held_tile(90, 4096, FEWEST_HELD - 1, 64)


def held(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    properties = torch.cuda.get_device_properties(0)
    if (properties.major, properties.minor, properties.multi_processor_count) != (9, 0, PROCESSORS):
        pytest.skip("measured on an H200")
    return launched(monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "dtype", "settled"), pairwise(KINDS, [BF16, FP16], [False, True]))
def test_a_layer(kind: str, dtype: torch.dtype, settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = held(monkeypatch)
    for counts in (QKV, ODD, OUT, GATE_UP):
        weights = [of_kind(kind, count, 4096, "cuda", seed) for seed, count in enumerate(counts)]
        gated, single = counts == GATE_UP, counts == OUT
        check(1, weights, dtype, bias=not gated, residual=dtype if single else None, gated=gated, weights_settled=settled)
        if single:
            check(1, weights, dtype, residual=FP32, weights_settled=settled)
    assert names == 10 * ["codes_held_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("block", [128, 1024, 4096])
def test_blocks_of_a_layer(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = held(monkeypatch)
    for nested in (False, True):
        check(1, [block_codes(4096, 4096, "nf4", block, nested, "cuda")])
    assert names == 4 * ["codes_held_kernel"]


@pytest.mark.gpu
def test_a_chain_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch starts before the one ahead has ended, and waits for what that one writes."""
    names = held(monkeypatch)
    weights = [of_kind("nf4", 4096, 4096, "cuda", seed) for seed in range(4)]
    x = torch.randn(1, 4096, device="cuda", dtype=BF16)

    def chain(waits: bool) -> torch.Tensor:
        y = x
        for weight in 8 * weights:
            (y,) = products.matvec(y, [weight], residual=x, weights_settled=True)
            if waits:
                torch.cuda.synchronize()
        return y

    want = chain(True)
    assert want.isfinite().all() and all(torch.equal(chain(False), want) for _ in range(5))
    assert set(names) == {"codes_held_kernel"}


@pytest.mark.gpu
def test_what_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    names = held(monkeypatch)
    check(1, [of_kind("nf4", 4096, 14336, "cuda")])
    check(1, [of_kind("nf4", 1024, 4096, "cuda")])
    check(3, [of_kind("nf4", 4096, 4096, "cuda")])
    check(1, [of_kind("nf4", 4096, 4096, "cuda")], FP32)
    assert names == 6 * ["codes_matrix_kernel"] + 2 * ["codes_row_kernel"]
