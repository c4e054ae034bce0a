"""What the Hopper kernels need below Gluon: named barriers, packed registers, and a fence for the instruction scheduler."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def turn_wait(WARPGROUP: gl.constexpr):
    """Wait for this warpgroup's turn on the tensor cores (named barriers 9 and 10, 256 threads)."""
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def turn_pass(WARPGROUP: gl.constexpr):
    """Give the turn to the warpgroup named."""
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.arrive 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pack_pairs(x, DTYPE: gl.constexpr):
    """fp32 `[M, N]` to int32 `[M, N / 2]` of rounded 16-bit pairs.

    A loop has to carry these: a 16-bit tensor is split into halves and put together again in every iteration.
    """
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def unpack_pairs(packed, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """int32 `[M, N / 2]` from `pack_pairs` as `[M, N]` of DTYPE, an operand of the matrix unit."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    x = gl.join(low, high).reshape([packed.shape[0], packed.shape[1] * 2]).to(DTYPE, bitcast=True)
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def partial_row_sums(x):
    """fp32 `[M, N]` to `[M, 4]`: the sums of the four threads that share a row, which are added once, at the end."""
    y = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(y, 3), 1)


@gluon.jit
def schedule_fence(row_sums):
    """`row_sums` through a loop that is never entered, which ends the basic block.

    The assembler would otherwise move the exponentials behind the next wait for the matrix unit, and nothing would
    overlap. Sums of weights are at most the keys of a tile, so 1e30 is never passed; an empty loop would be removed.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .f32 t; max.f32 t, $2, $3; setp.gt.f32 p, t, 0f7149F2CA; "
        "spin: @p nanosleep.u32 1; @p bra.uni spin; mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=f,=f,f,f",
        [row_sums],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )
