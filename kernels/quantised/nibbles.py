"""Triton: products of x with words of eight 4-bit codes, as the values that they stand for.

A value is looked up without memory: `prmt` picks four bytes of a table of eight by four selectors of 4 bits, and four codes
side by side are such selectors. Two tables of eight values, chosen among by the uppermost bits of the codes, give a byte of
each value, twice as many its 16 bits; some 2.5 instructions a code, of which none waits for memory.

For x in bf16 these 16 bits are both halves of an fp32 number, which another `prmt` makes of them: none is spent on zeros.
16 bits do not hold the values exactly. They are held times a factor, for which the largest relative error is least (nf4:
2^-9.5, where rounding them to bf16 gives 2^-9.0); whoever multiplies divides by it in fp32. For x in fp16 they are numbers
of fp16, and for fp32 three products with bf16 are added: with what it keeps of a value, of the rest, and of that one's rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.assembly import ASSEMBLY
from hf_fastattn.kernels.quantised.weights import VALUES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# By how much the values are too large that are multiplied with x: found by trying two million.
FACTORS = {("nf4", BF16): 1.43865, ("nf4", FP16): 1.63849925, ("fp4", BF16): 1.4782215, ("fp4", FP16): 1.5}


def factor_of(kind: str, dtype: torch.dtype) -> float:
    """By how much the values of a kind are too large that kernels multiply with x of this dtype."""
    return FACTORS.get((kind, dtype), 1.0)


def held_bits(kind: str, dtype: torch.dtype) -> list[int]:
    """The 16 bits from which kernels make the values of a kind, times `factor_of`, for x of a 16-bit dtype."""
    values = torch.tensor(VALUES[kind], dtype=torch.float64) * factor_of(kind, dtype)
    if dtype is FP16:
        return _bits_of(values.to(FP16))
    near = torch.stack([values.to(BF16).view(torch.int16) + step for step in (-1, 0, 1)])
    # A step down from zero is no number.
    errors = [(doubled(one.tolist()).double() - values).abs().nan_to_num(1.0) for one in near]
    return [bits & 0xFFFF for bits in near.gather(0, torch.stack(errors).argmin(0)[None])[0].tolist()]


def doubled(bits: Sequence[int]) -> Tensor:
    """The fp32 numbers whose upper and lower halves are both `bits`."""
    halves = torch.tensor(bits, dtype=torch.int64) & 0xFFFF
    return (halves << 16 | halves).to(torch.uint32).view(FP32)


def held_values(kind: str, dtype: torch.dtype) -> list[float]:
    """The 16 values that kernels multiply with x of this dtype, times `factor_of`."""
    if dtype is FP32:
        return torch.tensor(VALUES[kind]).tolist()
    bits = held_bits(kind, dtype)
    return (doubled(bits) if dtype is BF16 else torch.tensor(bits, dtype=torch.uint16).view(FP16)).tolist()


def _bits_of(values: Tensor) -> list[int]:
    return [bits & 0xFFFF for bits in values.view(torch.int16).tolist()]


def product_assembly(bits: Sequence[int], form: str) -> str:
    """The sum of the products of a word's eight codes, $1, with $2 to $9, in $0; all but the word in fp32.

    Args:
        bits: of the values that the codes stand for.
        form: what they are: `"doubled"`, `"bf16"` or `"fp16"`.
    """
    return (
        "{ .reg .b32 code, late, a, b, h, l, h0, h1, h2, h3, l0, l1, l2, l3; .reg .f32 v, sum; "
        f"{_begun(bits, '$1')}mov.f32 sum, 0f00000000; {_half(2, form)}"
        f"shr.b32 code, code, 16; shr.b32 late, late, 16; {_half(6, form)}mov.f32 $0, sum; }}"
    )


def _begun(bits: Sequence[int], word: str) -> str:
    """The tables of the values, and the selectors of the codes in a word: among eight, and of which eight."""
    high, low = _words([number >> 8 for number in bits]), _words([number & 255 for number in bits])
    tables = "".join(f"mov.b32 h{i}, {high[i]}; mov.b32 l{i}, {low[i]}; " for i in range(4))
    # Codes from 8 on pick their byte from the second table.
    return (
        f"{tables}and.b32 code, {word}, 0x77777777; shr.b32 late, {word}, 1; and.b32 late, late, 0x44444444; "
        "or.b32 late, late, 0x32103210; "
    )


# The high bytes of the values of the four codes in the lower half of `code`, in h; their low bytes in l.
_LOOKED_UP = "".join(
    f"prmt.b32 a, {one}0, {one}1, code; prmt.b32 b, {one}2, {one}3, code; prmt.b32 {one}, a, b, late; " for one in "hl"
)


def _words(table: Sequence[int]) -> list[str]:
    return [f"0x{sum(table[4 * word + byte] << 8 * byte for byte in range(4)):08x}" for word in range(4)]


def _half(first: int, form: str) -> str:
    """Adds the products of the four codes in the lower half of `code` with four operands from number `first` on."""
    steps = [_LOOKED_UP]
    # The upper code of a byte is that of the earlier column.
    for column, code in enumerate((1, 0, 3, 2)):
        steps.append(f"{_number(code, form)}fma.rn.f32 sum, v, ${first + column}, sum; ")
    return "".join(steps)


def _number(code: int, form: str) -> str:
    """The value of code number `code`, whose bytes are in h and l, in v."""
    if form == "fp16":
        return f"{{ .reg .b16 x; prmt.b32 a, l, h, 0x{code + 4}{code}; cvt.u16.u32 x, a; cvt.f32.f16 v, x; }} "
    if form == "bf16":
        return f"prmt.b32 a, l, h, 0x{code + 4}{code}; shl.b32 a, a, 16; mov.b32 v, a; "
    return f"prmt.b32 a, l, h, 0x{2 * f'{code + 4}{code}'}; mov.b32 v, a; "


def thirds(kind: str) -> list[list[int]]:
    """The bits of three numbers of bf16 that add up to each value."""
    rest, parts = torch.tensor(VALUES[kind], dtype=torch.float64), []
    for _ in range(3):
        parts.append(_bits_of(rest.to(BF16)))
        rest = rest - rest.to(BF16).double()
    return parts


NF4_BF16, FP4_BF16 = (tl.constexpr(product_assembly(held_bits(kind, BF16), "doubled")) for kind in ("nf4", "fp4"))
NF4_FP16, FP4_FP16 = (tl.constexpr(product_assembly(held_bits(kind, FP16), "fp16")) for kind in ("nf4", "fp4"))
NF4_FIRST, NF4_SECOND, NF4_THIRD = (tl.constexpr(product_assembly(part, "bf16")) for part in thirds("nf4"))
FP4_FIRST, FP4_SECOND, FP4_THIRD = (tl.constexpr(product_assembly(part, "bf16")) for part in thirds("fp4"))
# For the matrix unit, which multiplies 16 bits: a factor of their own for bf16.
MATRIX_FACTORS = {("nf4", BF16): 1.18881075, ("nf4", FP16): FACTORS["nf4", FP16], ("fp4", BF16): 1.5, ("fp4", FP16): 1.5}


def matrix_bits(kind: str, dtype: torch.dtype) -> list[int]:
    """The 16 values of a kind in a 16-bit dtype, times its `MATRIX_FACTORS`, as bits."""
    return _bits_of((torch.tensor(VALUES[kind], dtype=torch.float64) * MATRIX_FACTORS[kind, dtype]).to(dtype))


def matrix_values(kind: str, dtype: torch.dtype) -> list[float]:
    """The same as numbers."""
    return torch.tensor(matrix_bits(kind, dtype), dtype=torch.uint16).view(dtype).tolist()


MATRIX = tl.constexpr({
    f"{kind} {name}": matrix_values(kind, dtype) for kind in VALUES for name, dtype in (("bf16", BF16), ("fp16", FP16))
})  # fmt: skip
HELD = tl.constexpr(
    {
        f"{kind} {name}": held_values(kind, dtype)
        for kind in VALUES
        for name, dtype in (("bf16", BF16), ("fp16", FP16), ("fp32", FP32))
    }
)


@triton.jit
def _dot(words, x0, x1, x2, x3, x4, x5, x6, x7, PRODUCT: tl.constexpr):
    return tl.inline_asm_elementwise(
        PRODUCT, "=&f,r,f,f,f,f,f,f,f,f", [words, x0, x1, x2, x3, x4, x5, x6, x7], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def compared(code, values):
    """The value of each code in fp32, by 16 comparisons: for the interpreter, which runs no assembly."""
    value = tl.zeros(code.shape, tl.float32)
    for number in range(16):
        value = tl.where(code == number, values[number], value)
    return value


@triton.jit
def dot_of_codes(words, x0, x1, x2, x3, x4, x5, x6, x7, KIND: tl.constexpr, dtype: tl.constexpr):
    """The products of the eight codes of each word with eight columns of x, in fp32, added up; times `factor_of`."""
    NF4: tl.constexpr = KIND == "nf4"
    if not ASSEMBLY:
        x = (x0, x1, x2, x3, x4, x5, x6, x7)
        total = tl.zeros(words.shape, tl.float32)
        for column in range(8):
            code = words >> (8 * (column // 2) + (0 if column % 2 else 4)) & 15
            total += compared(code, HELD.value[f"{KIND} {dtype}"]) * x[column]
    elif dtype == tl.float16:
        total = _dot(words, x0, x1, x2, x3, x4, x5, x6, x7, NF4_FP16 if NF4 else FP4_FP16)
    elif dtype == tl.bfloat16:
        total = _dot(words, x0, x1, x2, x3, x4, x5, x6, x7, NF4_BF16 if NF4 else FP4_BF16)
    else:
        total = _dot(words, x0, x1, x2, x3, x4, x5, x6, x7, NF4_THIRD if NF4 else FP4_THIRD)
        total += _dot(words, x0, x1, x2, x3, x4, x5, x6, x7, NF4_SECOND if NF4 else FP4_SECOND)
        total += _dot(words, x0, x1, x2, x3, x4, x5, x6, x7, NF4_FIRST if NF4 else FP4_FIRST)
    return total


@triton.jit
def block_scales(
    absmax_ptr, nested_ptr, levels_ptr, offset, row, block, BLOCKS: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """The magnitudes of blocks: of each row of `row`, among its BLOCKS, number `block`."""
    at = row * BLOCKS + block
    found = tl.load(absmax_ptr + at)
    if NESTED:
        scale = tl.load(levels_ptr + found.to(tl.int32)) * tl.load(nested_ptr + at // 256) + offset
    else:
        scale = found
    return scale
