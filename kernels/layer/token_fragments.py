"""What each lane of a warp gives to the matrix unit in products of few tokens: columns of two rows of a weight, and of x.

`mma.m16n8k16` (PTX) multiplies 16 rows of a weight with 8 tokens. Lane `4 g + t` gives four columns of rows g and g + 8,
and the same columns of token g; it gets the sums of both rows for tokens 2 t and 2 t + 1. Which columns these are is free as
long as weight and x agree: here they are halves of the 16 bytes that a lane loads at once, so that no lane needs what
another has. A tensor `[32 * warps]` lies one number in each thread, in order, as in `lanes.py`. The interpreter
runs no assembly: it computes the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.assembly import ASSEMBLY, FORMS
from hf_fastattn.kernels.layer.lanes import added_up, emulated_product, two_words

# Columns that the four lanes of a row load at once.
COLUMNS = tl.constexpr(32)
# Four lanes read 64 bytes of a row at once. Asked for 128, the L2 cache reads from memory in pieces twice as long: products
# of 4 tokens of a 4B and an 8B take 0.90 to 0.99 of the time (H200). Weights, read once, are to leave the L1 cache to x.
ONCE = tl.constexpr("ld.global.L1::no_allocate.L2::128B.v2.b64 {$0, $1}, [$2];")


def product_assembly(dtype: str, groups: int) -> str:
    """Adds the products of 32 columns to eight sums, from $0 on: four of each of two groups of eight tokens.

    Of a single group the two products have four sums each, so that neither waits for the other.
    Operands: the sums so far, 16 bytes of row g, of row g + 8, and of a token of each group.
    """
    form = FORMS[dtype]
    kind = f"mma.sync.aligned.m16n8k16.row.col.f32.{form}.{form}.f32"
    text = ["{ .reg .b32 x0, x1, x2, x3, ", ", ".join(f"{name}{i}" for name in "wv" for i in range(4)), "; "]
    for name, first in (("w", 16), ("v", 18)):
        text += [f"mov.b64 {{{name}{2 * i}, {name}{2 * i + 1}}}, ${first + i}; " for i in range(2)]

    def product(first: int, number: int, before: int) -> str:
        total, so_far = (", ".join(f"${at + i}" for i in range(4)) for at in (first, before))
        weights = ", ".join(f"{name}{i}" for i in (2 * number, 2 * number + 1) for name in "wv")
        return f"{kind} {{{total}}}, {{{weights}}}, {{x{2 * number}, x{2 * number + 1}}}, {{{so_far}}}; "

    for group in range(groups):
        text.append(f"mov.b64 {{x0, x1}}, ${20 + 2 * group}; mov.b64 {{x2, x3}}, ${21 + 2 * group}; ")
        text.append(product(4 * group, 0, 8 + 4 * group))
        text.append(product(4, 1, 12) if groups == 1 else product(4 * group, 1, 4 * group))
    return "".join(text) + "}"


def norm_assembly(unit_offset: bool) -> str:
    """$0 and $1: 8 columns of x in bf16 times the norm's weight; $2: their squares added to those so far.

    Operands: $3 and $4 x, $5 and $6 the weight, $7 the sum so far.
    """
    text = [
        "{ .reg .f32 low, high, by_low, by_high, sum; .reg .b32 x0, x1, x2, x3, n0, n1, n2, n3, y0, y1, y2, y3, a, b; "
        "mov.b64 {x0, x1}, $3; mov.b64 {x2, x3}, $4; mov.b64 {n0, n1}, $5; mov.b64 {n2, n3}, $6; mov.f32 sum, $7; "
    ]
    one = "add.f32 by_low, by_low, 0f3f800000; add.f32 by_high, by_high, 0f3f800000; " if unit_offset else ""
    for i in range(4):
        text.append(
            _widened(f"x{i}", "low", "high")
            + "fma.rn.f32 sum, low, low, sum; fma.rn.f32 sum, high, high, sum; "
            + _widened(f"n{i}", "by_low", "by_high")
            + f"{one}mul.f32 low, low, by_low; mul.f32 high, high, by_high; cvt.rn.bf16x2.f32 y{i}, high, low; "
        )
    return "".join(text) + "mov.b64 $0, {y0, y1}; mov.b64 $1, {y2, y3}; mov.f32 $2, sum; }"


def _widened(word: str, low: str, high: str) -> str:
    """Both bf16 numbers of a word in fp32."""
    return f"shl.b32 a, {word}, 16; and.b32 b, {word}, 0xffff0000; mov.b32 {low}, a; mov.b32 {high}, b; "


PRODUCTS = tl.constexpr({f"{name} {groups}": product_assembly(name, groups) for name in FORMS for groups in (1, 2)})
NORMS = tl.constexpr({f"{offset}": norm_assembly(offset) for offset in (False, True)})


@triton.jit
def no_fragments():
    """What tuples of fragments begin as."""
    return ()


@triton.jit
def _weight_words(pointers):
    """Two int64 side by side, at addresses of whole 16 bytes."""
    if ASSEMBLY:
        first, second = tl.inline_asm_elementwise(
            ONCE.value, "=l,=l,l", [pointers.to(tl.int64)], dtype=(tl.int64, tl.int64), is_pure=False, pack=1
        )
    else:
        first, second = tl.load(pointers), tl.load(pointers + 1)
    return first, second


@triton.jit
def weight_fragments(low_ptr, high_ptr, part, LOADS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """Part number `part` of a weight's columns: LOADS times 16 bytes of row g, and of row g + 8, at each lane's columns.

    Unless all warps have a part (WHOLE), those that have none read the last one again.
    """
    at = (part if WHOLE else tl.minimum(part, PARTS - 1)) * (8 * LOADS)
    found = no_fragments()
    for load in tl.static_range(LOADS):
        found += ((_weight_words(low_ptr + at + 8 * load), _weight_words(high_ptr + at + 8 * load)),)
    return found


@triton.jit
def x_fragment(x_ptr, part, load: tl.constexpr, LOADS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr):
    """The columns of load number `load` in that part of a row of x: two words; zeros where there is no such part."""
    at = (part if WHOLE else tl.minimum(part, PARTS - 1)) * (8 * LOADS) + 8 * load
    first, second = two_words(x_ptr + at, False)
    if not WHOLE:
        first, second = tl.where(part < PARTS, first, 0), tl.where(part < PARTS, second, 0)
    return first, second


@triton.jit
def _numbers(fragment, dtype: tl.constexpr):
    """The 8 numbers of a fragment in fp32, `[threads, 8]`; what `normalise` has made is these already."""
    if len(fragment) == 1:
        return fragment[0]
    at = tl.arange(0, 8)[None, :]
    words = tl.where(at < 4, fragment[0][:, None], fragment[1][:, None])
    return (words >> (16 * (at % 4)).to(tl.int64)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def normalise(x, factor, squares, UNIT_OFFSET: tl.constexpr):
    """A fragment of x in bf16 times one of the norm's weight, rounded to bf16, and the squares of x added up."""
    if ASSEMBLY:
        first, second, squares = tl.inline_asm_elementwise(
            NORMS.value[f"{UNIT_OFFSET}"], "=&l,=&l,=&f,l,l,l,l,f",
            [x[0], x[1], factor[0], factor[1], squares],
            dtype=(tl.int64, tl.int64, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        return (first, second), squares
    else:
        wide, by = _numbers(x, tl.bfloat16), _numbers(factor, tl.bfloat16)
        if UNIT_OFFSET:
            by += 1.0
        return ((wide * by).to(tl.bfloat16).to(tl.float32),), squares + tl.sum(wide * wide, 1)


@triton.jit
def multiply(sums, weight, first, second, dtype: tl.constexpr, SUMS: tl.constexpr):
    """Eight sums of each lane and the products of 32 columns of both rows with those of token g, and g + 8 if SUMS is 8.

    If SUMS is 4, two sums each are of the same row and token.
    """
    low, high = weight
    if not ASSEMBLY:
        a, b = _numbers(low, dtype), _numbers(high, dtype)
        c0, c1, c2, c3 = emulated_product(a, b, _numbers(first, dtype))
        more = (sums[4], sums[5], sums[6], sums[7])
        if SUMS == 8:
            c4, c5, c6, c7 = emulated_product(a, b, _numbers(second, dtype))
            more = (sums[4] + c4, sums[5] + c5, sums[6] + c6, sums[7] + c7)
        found = (sums[0] + c0, sums[1] + c1, sums[2] + c2, sums[3] + c3, *more)
    elif SUMS == 8:
        found = tl.inline_asm_elementwise(
            PRODUCTS.value[f"{dtype} 2"],
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,l,l,l,l,l,l,l,l",
            [
                sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7],
                low[0], low[1], high[0], high[1], first[0], first[1], second[0], second[1],
            ],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            PRODUCTS.value[f"{dtype} 1"], "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f,l,l,l,l,l,l",
            [
                sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7],
                low[0], low[1], high[0], high[1], first[0], first[1],
            ],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    return found


@triton.jit
def sums_of_rows(sums, SUMS: tl.constexpr):
    """`[32, SUMS]`, the sums of all warps, as `store_sums` takes them."""
    if SUMS == 8:
        total = added_up(sums, 8)
    else:
        total = added_up((sums[0] + sums[4], sums[1] + sums[5], sums[2] + sums[6], sums[3] + sums[7]), 4)
    return total


@triton.jit
def _sums_of_tokens(squares):
    """Of `[32 * warps]` numbers the sum for each g: `[8]`."""
    return tl.sum(tl.sum(tl.reshape(squares, (squares.shape[0] // 32, 8, 4)), 2), 0)


@triton.jit
def scale_of_tokens(squares, second, K: tl.constexpr, eps, SUMS: tl.constexpr):
    """What an RMSNorm divides by, as a factor on `sums_of_rows`; squares are of token g, and g + 8."""
    scale = tl.rsqrt(_sums_of_tokens(squares) / K + eps)
    # Lane 4 g + t has tokens 2 t and 2 t + 1, and with eight sums those eight further on.
    if SUMS == 8:
        pair = tl.join(scale, tl.rsqrt(_sums_of_tokens(second) / K + eps))  # [8, 2]
        found = tl.reshape(tl.broadcast_to(tl.reshape(pair, (1, 4, 1, 4)), (8, 4, 2, 4)), (32, 8))
    else:
        found = tl.reshape(tl.broadcast_to(tl.reshape(scale, (1, 4, 1, 2)), (8, 4, 2, 2)), (32, 4))
    return found
