"""What the Hopper kernels need beyond Gluon, in PTX: named barriers, packed registers, ordered reductions, a fence."""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton 3.6 reduces what a thread holds in its order: the machine code is that of the reductions below, and half as much
# has to be compiled. Later ones reduce by pairs, which rounds otherwise.
REDUCES_IN_ORDER = gl.constexpr(triton.__version__.startswith("3.6."))


@gluon.jit
def wait_for_launch_ahead():
    """Wait until the launch ahead has ended, and what it wrote is there."""
    gl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def start_launch_behind():
    """Let the launch behind begin, once all programs have come to this."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def turn_wait(WARPGROUP: gl.constexpr):
    """Wait for this warpgroup's turn on the tensor cores (named barriers 9 and 10, 256 threads)."""
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def turn_pass(WARPGROUP: gl.constexpr):
    """Give the turn to warpgroup WARPGROUP."""
    if WARPGROUP == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.arrive 10, 256; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pack_pairs(x, DTYPE: gl.constexpr):
    """fp32 `[M, N]` to int32 `[M, N / 2]` of rounded 16-bit pairs.

    Loops carry weights in this form: a 16-bit tensor would be split into halves and joined again in every iteration.
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
def power_of_two(x):
    """`2 ** x` of fp32, as `gl.exp2`, which calls a function of a library that LLVM has to take in for each number."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    """`1 / x` of fp32, to one unit in the last place; a quotient takes four more instructions, for divisors out of range."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def copy_registers(packed):
    """A copy of `packed`, for which the assembler may choose other registers, at the cost of a move each.

    For use between two loops that carry the same operand: with the same registers in both, half of the operand was moved
    in every iteration.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [packed], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _halves(x):
    """`[M, N, K]` as its first and last half along N; no data moves."""
    return gl.split(x.reshape([x.shape[0], 2, x.shape[1] // 2, x.shape[2]]).permute((0, 2, 3, 1)))


@gluon.jit
def _add_in_order(x):
    """Sum of `[M, N, K]` along N, `[M, 1, K]`, each term added to the sum of those before it."""
    first, last = _halves(x)
    if x.shape[1] == 2:
        return first + last
    else:
        return _add_to(_add_in_order(first), last)


@gluon.jit
def _add_to(start, x):
    """`start: [M, 1, K]` plus the terms of `x: [M, N, K]`, in order."""
    if x.shape[1] == 1:
        return start + x
    else:
        first, last = _halves(x)
        return _add_to(_add_to(start, first), last)


@gluon.jit
def _max_with(start, x):
    """Maximum of `start: [M, 1, 4]` and the pairs of `x: [M, N, 8]`, in order."""
    if x.shape[1] == 1:
        even, odd = gl.split(x.reshape([x.shape[0], 1, 4, 2]))
        return gl.maximum(gl.maximum(start, even), odd)
    else:
        first, last = _halves(x)
        return _max_with(_max_with(start, first), last)


@gluon.jit
def _max_in_order(x):
    """Maximum of `[M, N, 8]` along N and the pairs, `[M, 1, 4]`, in order."""
    if x.shape[1] == 1:
        even, odd = gl.split(x.reshape([x.shape[0], 1, 4, 2]))
        return gl.maximum(even, odd)
    else:
        first, last = _halves(x)
        return _max_with(_max_in_order(first), last)


@gluon.jit
def partial_row_sums(x):
    """fp32 `[M, N]` to `[M, 4]`: a sum for each of the four threads that share a row. They are added once, at the end."""
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]))
    if REDUCES_IN_ORDER:
        return gl.sum(even + odd, 1)
    else:
        return _add_in_order(even + odd).reshape([x.shape[0], 4])


@gluon.jit
def row_maxima(x, LAYOUT: gl.constexpr):
    """Maximum of each row of fp32 `[M, N]`, in slices of LAYOUT."""
    if REDUCES_IN_ORDER:
        pairs = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2]).permute((0, 2, 1, 3))  # [M, 4, N / 8, 2]
        each = gl.max(pairs.reshape([x.shape[0], 4, x.shape[1] // 4]), 2)
    else:
        each = _max_in_order(x.reshape([x.shape[0], x.shape[1] // 8, 8])).reshape([x.shape[0], 4])
    return gl.convert_layout(gl.max(each, 1), gl.SliceLayout(1, LAYOUT), assert_trivial=True)


@gluon.jit
def schedule_fence(row_sums):
    """`row_sums`, unchanged, after a loop that is never entered, which ends the basic block.

    Otherwise the assembler would move the exponentials behind the next wait for the matrix unit, and nothing would overlap.
    The loop's condition is never true: sums of weights are at most the number of keys of a tile, far below 1e30. A loop
    without a condition would be removed.
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


@gluon.jit
def settled(bits):
    """int32 `[M, 4]`, unchanged, before what follows is computed: see `schedule_fence`. No integer is as large as 1e30."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 u; .reg .f32 t; xor.b32 u, $2, $3; cvt.rn.f32.u32 t, u; setp.gt.f32 p, t, 0f7149F2CA; "
        "wait: @p nanosleep.u32 1; @p bra.uni wait; mov.b32 $0, $2; mov.b32 $1, $3; }",
        "=r,=r,r,r",
        [bits],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )
