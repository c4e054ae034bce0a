"""A warp of 32 lanes that runs PTX on the CPU: of the instructions that fragments of the matrix unit are made with."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

LANES = 32
Registers = dict[str, np.ndarray]


class Warp:
    """Runs assembly whose operands are `$0`, `$1`, ...; registers hold bits, as unsigned integers of 64.

    Attributes:
        memory: shared memory, in bytes, which lives on between runs.
    """

    def __init__(self, size: int = 1 << 16) -> None:
        self.memory = np.zeros(size, dtype=np.uint8)

    def run(self, assembly: str, operands: Mapping[str, Sequence[int]]) -> Registers:
        """The registers after all lanes have run `assembly` with `operands`, a number for each lane."""
        registers = {name: np.array(values, dtype=np.uint64) for name, values in operands.items()}
        body = re.sub(r"\.(reg|shared) [^;]*;", "", assembly.strip()[1:-1])
        for line in filter(None, map(str.strip, body.split(";"))):
            operation, _, rest = line.partition(" ")
            names = [name for name in re.split(r"[{}\[\],\s]+", rest) if name]
            given = [self._value(name, registers) for name in names]
            if operation.startswith("mma"):
                registers.update(zip(names[:4], _multiplied(operation, given), strict=True))
            elif operation == "mov.b64" and len(names) == 3:
                registers[names[0]], registers[names[1]] = given[2] & 0xFFFFFFFF, given[2] >> 32
            elif operation == "st.shared.v4.b32":
                for part in range(4):
                    self._store(given[0] + 4 * part, given[1 + part])
            elif operation == "ld.shared.b32":
                registers[names[0]] = self._load(given[1])
            else:
                registers[names[0]] = STEPS[operation](*given[1:]) & 0xFFFFFFFF
        return registers

    def _value(self, name: str, registers: Registers) -> np.ndarray:
        if name in registers:
            return registers[name]
        if not name[0].isdigit():
            # Registers yet to be written, and the name of shared memory, which begins at 0.
            return np.zeros(LANES, dtype=np.uint64)
        return np.full(LANES, int(name[2:], 16) if name.startswith(("0f", "0x")) else int(name), dtype=np.uint64)

    def _store(self, at: np.ndarray, values: np.ndarray) -> None:
        for address, value in zip(at, values, strict=True):
            self.memory[int(address) : int(address) + 4] = list(struct.pack("<I", int(value)))

    def _load(self, at: np.ndarray) -> np.ndarray:
        words = [struct.unpack("<I", self.memory[int(address) : int(address) + 4].tobytes())[0] for address in at]
        return np.array(words, dtype=np.uint64)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a | b << np.uint64(32)
    # The uppermost bit of a selector would repeat a sign.
    assert not (selector & 0x8888).any()
    picked = [(both >> (selector >> np.uint64(4 * i) & 7) * 8 & 255) << np.uint64(8 * i) for i in range(4)]
    return np.bitwise_or.reduce(picked)


STEPS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.b32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "bfe.u32": lambda a, first, count: a >> first & (1 << count) - 1,
    "lop3.b32": lambda a, b, c, table: _logic(a, b, c, int(table[0])),
    "prmt.b32": _permuted,
}


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """Only the one that is used: what a and b share, and c."""
    assert table == (0xF0 & 0xCC | 0xAA)
    return a & b | c


def _multiplied(operation: str, given: list[np.ndarray]) -> list[np.ndarray]:
    """`mma.m16n8k16` by the fragments that the PTX manual gives, summed in fp32."""
    dtype = torch.bfloat16 if operation.endswith("bf16.bf16.f32") else torch.float16
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    for lane in range(LANES):
        g, t = lane // 4, lane % 4
        for i in range(4):
            a[g + 8 * (i % 2), 2 * t + 8 * (i // 2) :][:2] = _pair(given[4 + i][lane], dtype)
        for i in range(2):
            b[2 * t + 8 * i :, g][:2] = _pair(given[8 + i][lane], dtype)
    product = a @ b
    sums = []
    for i in range(4):
        added = [product[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2].item() for lane in range(LANES)]
        sums.append(bits_of(np.array(added, dtype=np.float32) + numbers_of(given[10 + i])))
    return sums


def _pair(word: np.uint64, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([int(word) & 0xFFFF, int(word) >> 16], dtype=torch.int32).to(torch.uint16).view(dtype).float()


def numbers_of(bits: np.ndarray) -> np.ndarray:
    """The fp32 numbers of registers."""
    return bits.astype(np.uint32).view(np.float32)


def bits_of(numbers: np.ndarray) -> np.ndarray:
    """The registers of fp32 numbers."""
    return numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
