"""8-bit keys and values inside the attention kernels: their scales, and what they are multiplied with.

Values of 8 bits are widened to fp16, which holds every number of e4m3 and int8 exactly and costs one or two instructions for
two elements; nothing is multiplied element by element. The scale of a key multiplies its scores, the scale of a value its
weights, relative to the largest scale of the tile, so that fp16's range is enough; the tile's product is then multiplied by
that scale in fp32. Queries of bf16 are multiplied by a power of two before they become fp16, their scores divided by it.
Sums are those of the 16-bit kernels, in fp32. The layout of pages is that of `quantised.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.assembly import ASSEMBLY

# Four numbers of e4m3 in a word to two words of fp16.
FP8_TO_FP16 = tl.constexpr(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }"
)
# Four integers in a word likewise: byte b + 128 below the exponent of 1024 is the number 1024 + b + 128.
INT8_TO_FP16 = tl.constexpr(
    "{ .reg .b32 word, offset; xor.b32 word, $2, 0x80808080; mov.b32 offset, 0x64806480; "
    "prmt.b32 $0, word, 0x64646464, 0x4140; prmt.b32 $1, word, 0x64646464, 0x4342; "
    "sub.f16x2 $0, $0, offset; sub.f16x2 $1, $1, offset; }"
)


@triton.jit
def largest_of(x, y):
    """The largest magnitude in each row of `x: [rows, X]` and `y: [rows, Y]`, and 0, or NaN unless all are finite."""
    largest = tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1))
    return largest, tl.sum(x * 0.0, 1) + tl.sum(y * 0.0, 1)


@triton.jit
def scale_of(largest, poison, dtype: tl.constexpr):
    """For rows of this largest magnitude `[rows]`: the bits of their scales, fp32 that bf16 holds, and 1 / scale.

    See `page_formats.quantise`.
    """
    if dtype == tl.int8:
        bits = (largest * (1.0 / 127.0)).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        bits = tl.maximum(bits, 1 << 23)
    else:
        exponent = (largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
        bits = tl.maximum(exponent - 8, 1) << 23
    factor = tl.div_rn(tl.full(bits.shape, 1.0, tl.float32), bits.to(tl.float32, bitcast=True))
    return tl.where(poison == 0.0, bits, 0x7FC00000), factor


@triton.jit
def scaled(x, factor, dtype: tl.constexpr):
    """`x: [rows, X]` times `factor: [rows]`, within the range of `dtype`, and a whole number for integers."""
    y = x * factor[:, None]
    if dtype == tl.int8:
        # Rounded to the nearest, of two the even one, as adding this number rounds.
        y = tl.clamp(y, -127.0, 127.0) + 12582912.0
        y = y - 12582912.0
    else:
        y = tl.clamp(y, -448.0, 448.0)
    return y


@triton.jit
def key_and_value_scales(k_ptr, page, key_n, head, ok_n, stride_page, stride_slot, PAGE: tl.constexpr):
    """The fp32 scales `[N]` of the keys and values of `key_n: [N]` in `page: [N]`; 0 where `ok_n`, if given, is false.

    A word of a page holds both, as bf16: the key's in its lower half.
    """
    words = k_ptr.to(tl.pointer_type(tl.int32))
    at = page.to(tl.int64) * (stride_page // 4) + (PAGE * stride_slot // 2 + head * PAGE) + key_n % PAGE
    if ok_n is None:
        word = tl.load(words + at)
    else:
        word = tl.load(words + at, mask=ok_n, other=0)
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def widened(x, dtype: tl.constexpr):
    """`x: [N, D]` of 8 bits in fp16, or fp32 for queries of that type, exactly."""
    if x.dtype == tl.int8 and ASSEMBLY:
        half = tl.inline_asm_elementwise(INT8_TO_FP16, "=&r,=&r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    else:
        half = x.to(tl.float16)
    if dtype == tl.float32:
        wide = half.to(tl.float32)
    else:
        wide = half
    return wide


@triton.jit
def widened_words(word, INTEGERS: tl.constexpr):
    """Four numbers of 8 bits in each `word: [N, D / 4]` as four fp16 tensors, the first from its lowest byte."""
    if ASSEMBLY:
        if INTEGERS:
            low, high = tl.inline_asm_elementwise(
                INT8_TO_FP16, "=&r,=&r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
        else:
            low, high = tl.inline_asm_elementwise(
                FP8_TO_FP16, "=&r,=&r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
        first = low.to(tl.int16).to(tl.float16, bitcast=True)
        second = (low >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        third = high.to(tl.int16).to(tl.float16, bitcast=True)
        fourth = (high >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        first = _byte_of(word, 0, INTEGERS)
        second = _byte_of(word, 8, INTEGERS)
        third = _byte_of(word, 16, INTEGERS)
        fourth = _byte_of(word, 24, INTEGERS)
    return first, second, third, fourth


@triton.jit
def _byte_of(word, SHIFT: tl.constexpr, INTEGERS: tl.constexpr):
    byte = (word >> SHIFT).to(tl.int8)
    if INTEGERS:
        half = byte.to(tl.float16)
    else:
        half = byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return half


@triton.jit
def widened_query(q):
    """`q: [M, D]` as its products with widened keys take it, and the factors `[M]` of the scores that undo it.

    A power of two brings the largest element of a row of bf16 to about 2^15: elements down to 2^-32 of it stay exact.
    """
    if q.dtype == tl.bfloat16:
        wide = q.to(tl.float32)
        # The exponents of the largest elements; of what is not finite, the factor does not matter.
        exponent = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 16), 254)
        factor = ((269 - exponent) << 23).to(tl.float32, bitcast=True)
        undo = ((exponent - 15) << 23).to(tl.float32, bitcast=True)
        widened_q = (wide * factor[:, None]).to(tl.float16)
    else:
        widened_q = q
        undo = tl.full([q.shape[0]], 1.0, tl.float32)
    return widened_q, undo


@triton.jit
def relative_weights(weights, value_scales):
    """fp16 weights `[M, N]` times the scales of values `[N]` relative to the largest of these, and that one."""
    largest = tl.max(value_scales, 0)
    relative = value_scales * tl.where(largest > 0, 1.0 / largest, 0.0)
    return (weights * relative[None, :]).to(tl.float16), largest


@triton.jit
def add_scaled(weights, v, value_scales, acc, PRECISION: tl.constexpr):
    """`acc: [M, D]` plus the values `v: [N, D]`, widened, times their scales `[N]` and weights `[M, N]`."""
    if v.dtype == tl.float32:
        acc = tl.dot(weights * value_scales[None, :], v, acc, input_precision=PRECISION)
    else:
        relative, largest = relative_weights(weights, value_scales)
        acc += tl.dot(relative, v) * largest
    return acc


@triton.jit
def columns_by_four(x):
    """`x: [M, D]` as four `[M, D / 4]`: columns 0, 4, 8, ..., then 1, 5, 9, ... and so on."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def columns_together(first, second, third, fourth):
    """What `columns_by_four` took apart."""
    joined = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(joined, (first.shape[0], first.shape[1] * 4))
