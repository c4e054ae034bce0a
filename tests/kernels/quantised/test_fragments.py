"""The assembly of fragments, run by a warp on the CPU: the sums of a lane are of its rows, columns and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_fastattn.kernels.quantised import fragments
from hf_fastattn.kernels.quantised.nibbles import matrix_bits, matrix_values
from hf_fastattn.kernels.quantised.reference import dequantised
from tests.kernels.quantised.weight_cases import tiled_ints
from tests.tools.warp import LANES, Registers, Warp, numbers_of

BF16, FP16 = torch.bfloat16, torch.float16
NAMES = {BF16: "bf16", FP16: "fp16"}
LANE = np.arange(LANES)
# Of a lane: its row and token, and its place among the four that share them.
OWN, PLACE = LANE // 4, LANE % 4


def words_of(numbers: torch.Tensor) -> np.ndarray:
    """Pairs of numbers of 16 bits as words, the first in the lower half; `[..., columns / 2]`."""
    bits = numbers.contiguous().view(torch.uint16).numpy().astype(np.uint64)
    return bits[..., ::2] | bits[..., 1::2] << np.uint64(16)


def sums_of(registers: Registers, groups: int) -> np.ndarray:
    """`[16, tokens]` of the four sums of each lane and group, rows g and g + 8 for tokens 2 t and 2 t + 1."""
    found = np.full((16, 8 * groups), np.nan)
    for number in range(4 * groups):
        rows, tokens = OWN + 8 * (number % 4 // 2), 8 * (number // 4) + 2 * PLACE + number % 2
        found[rows, tokens] = numbers_of(registers[f"${number}"])
    return found


def table(kind: str, dtype: torch.dtype, entries: int) -> tuple[Warp, np.ndarray]:
    """A warp whose shared memory holds the table that all warps of a program have filled, and where lanes begin."""
    warp, threads = Warp(), 256 // entries
    assembly = fragments.table_assembly(matrix_bits(kind, dtype), entries)
    for first in range(0, threads, LANES):
        filled = warp.run(assembly, {"$1": first + LANE, "$2": LANE, "$3": np.full(LANES, threads)})
    return warp, filled["$0"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("entries", [1, 2])
def test_each_byte_has_its_pair_in_each_bank(kind: str, dtype: torch.dtype, entries: int) -> None:
    warp, begins = table(kind, dtype, entries)
    assert np.array_equal(begins, 4 * LANE)
    held = torch.from_numpy(warp.memory[: 256 * 128].copy()).view(torch.uint16).view(dtype).view(256, LANES, 2)
    values = torch.tensor(matrix_values(kind, dtype), dtype=dtype)
    codes = torch.arange(256)
    assert torch.equal(held, torch.stack((values[codes >> 4], values[codes & 15]), -1)[:, None].expand(256, LANES, 2))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("groups", [1, 2])
def test_sums_of_codes(kind: str, dtype: torch.dtype, groups: int) -> None:
    torch.manual_seed(0)
    warp, begins = table(kind, dtype, 1)
    codes, x = torch.randint(0, 256, (16, 32), dtype=torch.uint8), torch.randn(8 * groups, 64).to(dtype)
    bytes_of = codes.numpy().view("<u8")  # [16, 4]: 16 columns each
    numbers = words_of(x).reshape(8 * groups, 4, 4, 2)  # token, place, eight bytes, word
    sums = 4 * groups
    operands = {f"${sums}": bytes_of[OWN, PLACE], f"${sums + 1}": bytes_of[OWN + 8, PLACE], f"${2 + 2 * sums}": begins}
    for group in range(groups):
        held = numbers[OWN + 8 * group, PLACE]
        for i in range(4):
            operands[f"${sums + 2 + 4 * group + i}"] = held[:, i, 0] | held[:, i, 1] << np.uint64(32)
    found = sums_of(warp.run(fragments.codes_assembly(NAMES[dtype], groups), operands), groups)
    values = torch.tensor(matrix_values(kind, dtype), dtype=torch.float64)
    weight = torch.stack((values[codes.long() >> 4], values[codes.long() & 15]), -1).view(16, 64)
    assert np.allclose(found, (weight @ x.double().t()).numpy(), atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_sums_of_tiles(groups: int) -> None:
    torch.manual_seed(0)
    # Two parts of two tiles, scales of 1 and offsets of 136: `128 + q`.
    weight, x = tiled_ints(16, 256), torch.randn(8 * groups, 128).bfloat16()
    weight.scales.copy_(torch.tensor([1.0, 136.0]))
    lanes = weight.words[:, 1].numpy().view("<u8").astype(np.uint64)  # [tile, lane, two]
    columns = words_of(x).reshape(8 * groups, 16, 4)  # token, eight columns, place
    of_x = [columns[OWN + 8 * group, i, PLACE] for group in range(groups) for i in range(16)]
    sums, warp = 4 * groups, Warp()
    held = [lanes[0, :, 0], lanes[0, :, 1], lanes[1, :, 0], lanes[1, :, 1], *of_x]
    found = warp.run(fragments.tile_assembly(groups), {f"${sums + i}": values for i, values in enumerate(held)})
    want = dequantised(weight, torch.float64)[:, 128:] @ x.double().t()
    assert np.allclose(sums_of(found, groups), want.numpy(), atol=1e-2)
    ones = warp.run(fragments.ones_assembly(groups), {f"${sums + i}": values for i, values in enumerate(of_x)})
    assert np.allclose(sums_of(ones, groups), x.double().sum(1).expand(16, -1).numpy(), atol=1e-3)
