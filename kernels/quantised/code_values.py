"""Triton: what products of 4-bit codes on the matrix unit share: the table of values, and the magnitudes of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_fastattn.kernels.attention.eight_bits import ASSEMBLY
from hf_fastattn.kernels.quantised.fragments import table_assembly
from hf_fastattn.kernels.quantised.nibbles import compared, matrix_bits
from hf_fastattn.kernels.quantised.weights import VALUES

# Rows of a fragment, and columns that a warp takes at once: four of its blocks.
ROWS, COLUMNS = tl.constexpr(16), tl.constexpr(256)
# What shares a magnitude; blocks are no smaller.
PRODUCT_COLUMNS = tl.constexpr(64)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TABLES = tl.constexpr({
    f"{kind} {name} {entries}": table_assembly(matrix_bits(kind, dtype), entries)
    for kind in VALUES for name, dtype in DTYPES.items() for entries in (1, 2, 4)
})  # fmt: skip


@triton.jit
def table_of_values(thread, KIND: tl.constexpr, dtype: tl.constexpr):
    """Where in shared memory the column of each lane in the table of values begins."""
    THREADS: tl.constexpr = thread.shape[0]
    if ASSEMBLY:
        ENTRIES: tl.constexpr = 256 // THREADS if THREADS < 256 else 1
        distance = tl.full(thread.shape, THREADS, tl.int32)
        table = tl.inline_asm_elementwise(
            TABLES.value[f"{KIND} {dtype} {ENTRIES}"], "=&r,r,r,r", [thread % 256, thread % 32, distance],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()
    else:
        table = thread
    return table


@triton.jit
def compared_words(words, values):
    """The 16 values of the codes in an int64 of each thread, for the interpreter: `[threads, 16]`."""
    at = tl.arange(0, 16)[None, :]
    # The upper code of a byte is that of the earlier column.
    shift = (8 * (at // 2) + 4 * (1 - at % 2)).to(tl.int64)
    return compared(words[:, None] >> shift & 15, values)


@triton.jit
def read_magnitudes(weight, low, high, block, K: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr):
    """Those of 64 columns, number `block`, of rows `low` and `high`, as they lie in memory: see `magnitudes_of`."""
    _, absmax_ptr, nested_ptr, _, _ = weight
    at_low = low * (K // BLOCK) + block * PRODUCT_COLUMNS.value // BLOCK
    at_high = high * (K // BLOCK) + block * PRODUCT_COLUMNS.value // BLOCK
    absmax_low, absmax_high = tl.load(absmax_ptr + at_low), tl.load(absmax_ptr + at_high)
    if NESTED:
        nested_low, nested_high = tl.load(nested_ptr + at_low // 256), tl.load(nested_ptr + at_high // 256)
        return (absmax_low, absmax_high, nested_low, nested_high)
    else:
        return (absmax_low, absmax_high)


@triton.jit
def magnitudes_of(weight, absmax, NESTED: tl.constexpr):
    """What two rows have, looked up by `read_magnitudes`: later than these, so that no load waits for another."""
    _, _, _, levels_ptr, offset = weight
    if NESTED:
        low = tl.load(levels_ptr + absmax[0].to(tl.int32)) * absmax[2] + offset
        high = tl.load(levels_ptr + absmax[1].to(tl.int32)) * absmax[3] + offset
    else:
        low, high = absmax
    return low, high
