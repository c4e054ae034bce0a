"""The assembly that looks values up, run by a small machine: no GPU is needed to see that each code has its value."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from hf_fastattn.kernels.quantised import nibbles
from hf_fastattn.kernels.quantised.nibbles import BF16, FP16

WORDS = [0x76543210, 0xFEDCBA98, 0x0F1E2D3C, 0x89ABCDEF, 0xFFFFFFFF, 0x00000000, 0x13579BDF, 0x80000008]


def run(assembly: str, operands: dict[str, int]) -> dict[str, int]:
    """The registers, as 32 bits each, after the instructions; those of numbers hold the bits of fp32."""
    registers = dict(operands)

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return registers[name] if name in registers else int(name, 0) & 0xFFFFFFFF

    body = re.sub(r"\.reg [^;]*;|[{}]", "", assembly)
    for line in filter(None, map(str.strip, body.split(";"))):
        operation, _, rest = line.partition(" ")
        target, *sources = (name.strip() for name in rest.split(","))
        given = [value(name) for name in sources]
        registers[target] = STEPS[operation](*given)
    return registers


def _permuted(a: int, b: int, selector: int) -> int:
    held = struct.pack("<II", a, b)
    picked = [held[selector >> 4 * i & 7] for i in range(4)]
    # The uppermost bit of a selector would repeat a sign.
    assert not any(selector >> 4 * i & 8 for i in range(4))
    return int.from_bytes(bytes(picked), "little")


def _number(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _bits(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


STEPS = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "prmt.b32": _permuted,
    "cvt.u16.u32": lambda a: a & 0xFFFF,
    "cvt.f32.f16": lambda a: _bits(float(torch.tensor(a, dtype=torch.uint16).view(FP16))),
    "fma.rn.f32": lambda a, b, c: _bits(_number(a) * _number(b) + _number(c)),
}


def dots(assembly: str, word: int) -> list[float]:
    """What each of the eight columns is multiplied with."""
    found = []
    for column in range(8):
        operands = {f"${2 + other}": _bits(float(other == column)) for other in range(8)}
        found.append(_number(run(assembly, {"$1": word, **operands})["$0"]))
    return found


def columns(word: int) -> list[int]:
    """The codes of bitsandbytes' word by column: of each byte the upper one comes first."""
    return [code for byte in word.to_bytes(4, "little") for code in (byte >> 4, byte & 15)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("word", WORDS)
def test_products(kind: str, dtype: torch.dtype, word: int) -> None:
    assembly = nibbles.product_assembly(nibbles.held_bits(kind, dtype), "doubled" if dtype is BF16 else "fp16")
    assert dots(assembly, word) == [nibbles.held_values(kind, dtype)[code] for code in columns(word)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_thirds_add_up(kind: str) -> None:
    parts = [dots(nibbles.product_assembly(part, "bf16"), WORDS[0]) for part in nibbles.thirds(kind)]
    exact = [nibbles.VALUES[kind][code] for code in columns(WORDS[0])]
    assert [sum(each) for each in zip(*parts, strict=True)] == pytest.approx(exact, rel=2.0**-24, abs=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_values_are_near(kind: str, dtype: torch.dtype) -> None:
    """Nearer than the rounding of a number to the dtype may be, which is half of its epsilon."""
    exact = torch.tensor(nibbles.VALUES[kind], dtype=torch.float64)
    for values, factor in (
        (nibbles.held_values(kind, dtype), nibbles.factor_of(kind, dtype)),
        (nibbles.matrix_values(kind, dtype), nibbles.MATRIX_FACTORS[kind, dtype]),
    ):
        errors = (torch.tensor(values, dtype=torch.float64) / factor - exact).abs()
        assert bool((errors <= 0.41 * torch.finfo(dtype).eps * exact.abs()).all())
