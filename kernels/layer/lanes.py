"""Triton: tensors of one number for each thread, for fragments of the matrix unit: loads, exchanges, sums and their stores.

The fragments are those of `token_fragments.py` and `quantised/fragments.py`.

A tensor `[32 * warps]` lies one number in each thread, in order. The interpreter runs no assembly: it computes the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.assembly import ASSEMBLY

WIDE = tl.constexpr("ld.global.v2.b64 {$0, $1}, [$2];")
WIDE_ONCE = tl.constexpr("ld.global.L1::evict_first.v2.b64 {$0, $1}, [$2];")
# Of lane 0 to 3 among four.
FROM_LANE = tl.constexpr([f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1c1f, 0xffffffff;" for lane in range(4)])


@triton.jit
def two_words(pointers, ONCE: tl.constexpr):
    """Two int64 side by side, at addresses of whole 16 bytes; with ONCE they need not stay in the cache."""
    if ASSEMBLY:
        first, second = tl.inline_asm_elementwise(
            WIDE_ONCE if ONCE else WIDE,
            "=l,=l,l",
            [pointers.to(tl.int64)],
            dtype=(tl.int64, tl.int64),
            is_pure=False,
            pack=1,
        )
    else:
        first, second = tl.load(pointers), tl.load(pointers + 1)
    return first, second


@triton.jit
def of_lane(x, LANE: tl.constexpr):
    """x of lane number LANE of the four that share rows."""
    if ASSEMBLY:
        found = tl.inline_asm_elementwise(FROM_LANE.value[LANE], "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)
    else:
        four = tl.reshape(x, (x.shape[0] // 4, 4))
        own = tl.sum(tl.where((tl.arange(0, 4) == LANE)[None, :], four, 0.0), 1)
        found = tl.reshape(tl.broadcast_to(own[:, None], four.shape), x.shape)
    return found


@triton.jit
def emulated_product(low, high, x):
    """The four sums of each lane, of what the lanes hold of rows g and g + 8, and of x, in fp32: `[32 * warps, columns]`."""
    THREADS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = 4 * x.shape[1]
    tokens = tl.reshape(x, (THREADS // 32, 1, 8, COLUMNS))
    of_low = tl.sum(tl.reshape(low, (THREADS // 32, 8, 1, COLUMNS)) * tokens, 3)  # [warps, rows, tokens]
    of_high = tl.sum(tl.reshape(high, (THREADS // 32, 8, 1, COLUMNS)) * tokens, 3)
    c0, c1 = tl.split(tl.reshape(of_low, (THREADS, 2)))
    c2, c3 = tl.split(tl.reshape(of_high, (THREADS, 2)))
    return c0, c1, c2, c3


@triton.jit
def numbers_of(a, b, c, d, dtype: tl.constexpr):
    """The 16 numbers of 16 bits in four words of each thread, in fp32: `[32 * warps, 16]`."""
    at = tl.arange(0, 16)[None, :]
    words = tl.where(at < 4, a[:, None], tl.where(at < 8, b[:, None], tl.where(at < 12, c[:, None], d[:, None])))
    return (words >> (16 * (at % 4)).to(tl.int64)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def no_sums(THREADS: tl.constexpr, SUMS: tl.constexpr):
    """SUMS zeros of each thread: 2 for one token, 4 for up to eight, 8 for up to 16."""
    zero = tl.zeros([THREADS], tl.float32)
    if SUMS == 2:
        return (zero, zero)
    elif SUMS == 4:
        return (zero, zero, zero, zero)
    else:
        return (zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def plus_scaled(sums, c, low, high, SUMS: tl.constexpr):
    """The sums plus those of a product, times the scales of their rows."""
    if SUMS == 2:
        return (sums[0] + c[0] * low, sums[1] + c[2] * high)
    elif SUMS == 4:
        return (sums[0] + c[0] * low, sums[1] + c[1] * low, sums[2] + c[2] * high, sums[3] + c[3] * high)
    else:
        return (
            sums[0] + c[0] * low, sums[1] + c[1] * low, sums[2] + c[2] * high, sums[3] + c[3] * high,
            sums[4] + c[4] * low, sums[5] + c[5] * low, sums[6] + c[6] * high, sums[7] + c[7] * high,
        )  # fmt: skip


@triton.jit
def _joined(sums, SUMS: tl.constexpr):
    """`[threads, SUMS]`, in the order that `store_sums` says."""
    if SUMS == 2:
        joined = tl.join(sums[0], sums[1])
    else:
        joined = tl.join(tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3]))
        if SUMS == 8:
            joined = tl.join(joined, tl.join(tl.join(sums[4], sums[6]), tl.join(sums[5], sums[7])))
    return tl.reshape(joined, (sums[0].shape[0], SUMS))


@triton.jit
def added_up(sums, SUMS: tl.constexpr):
    """`[32, SUMS]`, the sums of all warps."""
    return tl.sum(tl.reshape(_joined(sums, SUMS), (sums[0].shape[0] // 32, 32, SUMS)), 0)


@triton.jit
def added_up_apart(sums, second, SUMS: tl.constexpr):
    """`[32, SUMS]` twice: the sums of the threads that are not `second`, and of those that are."""
    joined = _joined(sums, SUMS)
    both = tl.join(tl.where(second[:, None], 0.0, joined), tl.where(second[:, None], joined, 0.0))
    return tl.split(tl.sum(tl.reshape(both, (sums[0].shape[0] // 32, 32, SUMS, 2)), 0))


@triton.jit
def either(second, a_ptr, b_ptr):
    """A pointer for each thread: b where `second`, else a."""
    return tl.where(second, b_ptr.to(tl.int64), a_ptr.to(tl.int64)).to(a_ptr.dtype)


@triton.jit
def store_sums(y, y_ptr, residual_ptr, b_ptr, first, rows, tokens, column, stride_y, stride_r):
    """`y: [32, SUMS]` of 16 rows from `first` on, with bias and residual, to the columns of y from `column` on."""
    SUMS: tl.constexpr = y.shape[1]
    lane = tl.arange(0, 32)[:, None]
    q = tl.arange(0, SUMS)[None, :]
    half = q // (SUMS // 2)
    token = 2 * (lane % 4)
    if SUMS == 4:
        token += q % 2
    elif SUMS == 8:
        token += q // 2 % 2 + 8 * (q % 2)
    n = first + lane // 4 + 8 * half
    ok = (n < rows) & (token < tokens)
    if b_ptr is not None:
        y += tl.load(b_ptr + n, mask=ok, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + token * stride_r + n, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * stride_y + column + n, y.to(y_ptr.dtype.element_ty), mask=ok)
