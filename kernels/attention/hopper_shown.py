"""What a tile of the Gluon prefill shows, as bits: a register of a thread stands for all keys of a row that it holds.

Mask, causality and window are evaluated while products are under way, and kept in two registers of a thread instead of a
predicate for each of its 64 pairs: when the scores are there, one selection each is left. Edges are no comparisons of
pairs then, but counts of bits, a few instructions a row.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_fastattn.kernels.attention.hopper_registers import partial_row_sums, settled


@gluon.jit
def _bits_of(shown, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Bools that broadcast to `[64, BLOCK_N]` as int32 `[64, 4]`, for the four threads that share a row.

    Bit `2 i + s` of thread `j` stands for key `8 i + 2 j + s`.
    """
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    bit = gl.expand_dims(1 << (column // 8 * 2 + column % 2), 0)  # [1, BLOCK_N]
    return partial_row_sums(gl.where(shown, bit, gl.zeros([64, BLOCK_N], gl.int32, LAYOUT)))


@gluon.jit
def _bits_upto(last, LAYOUT: gl.constexpr):
    """Bits `[64, 4]`, in LAYOUT, of the keys of a tile up to its key `last: [64]`, which may lie outside of the tile."""
    own = gl.expand_dims(gl.convert_layout(last, gl.SliceLayout(1, LAYOUT), assert_trivial=True), 1)
    own = own - gl.expand_dims(2 * gl.arange(0, 4, gl.SliceLayout(0, LAYOUT)), 0)
    count = gl.maximum((own >> 3) * 2 + gl.minimum(own & 7, 1) + 1, 0)
    return gl.inline_asm_elementwise("bmsk.clamp.b32 $0, 0, $1;", "=r,r", [count], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def shown_keys(last, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """Bits `[64, 4]` of the keys of a tile up to its key `last: [64]`; see `_bits_of`."""
    bits = partial_row_sums(gl.zeros([64, BLOCK_N], gl.int32, LAYOUT))
    BITS: gl.constexpr = bits.type.layout
    return _bits_upto(last, BITS)


@gluon.jit
def shown_bits(
    first_key, last_key, pairs, hides, CFG: gl.constexpr, LAYOUT: gl.constexpr, MASK: gl.constexpr, HOOKS: gl.constexpr,
):  # fmt: skip
    """Bits `[64, 4]` of the pairs that mask, causality, the row's end and the window show; see `_bits_of`.

    Without MASK all are shown, and there are none; the mask is not evaluated unless it `hides` something.
    """
    b, h, q_idx, window, tensors, head, first_position = pairs
    BLOCK_N: gl.constexpr = CFG[1]
    if MASK == 0 or (HOOKS.mask_mod is None and window is None):
        return 0
    else:
        bits = partial_row_sums(gl.zeros([64, BLOCK_N], gl.int32, LAYOUT))
        BITS: gl.constexpr = bits.type.layout
        bits = _bits_upto(last_key - first_key, BITS)
        if window is not None:
            bits = bits & ~_bits_upto(q_idx - window - first_key, BITS)
        if HOOKS.mask_mod is not None:
            if hides:
                key = gl.expand_dims(first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)), 0)
                shown = HOOKS.mask_mod(b, gl.expand_dims(h, 1), gl.expand_dims(q_idx, 1), key, tensors)
                bits = bits & _bits_of(shown, LAYOUT, BLOCK_N)
        return settled(bits)


@gluon.jit
def _shown_where(scores, bits, bit, FINITE: gl.constexpr):
    """Scores, hidden where `bits` have no `bit`; in PTX, since LLVM would gather conditions and take them apart again."""
    HIDDEN: gl.constexpr = "0fF149F2CA" if FINITE else "0fFF800000"
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, " + HIDDEN + ", p; }",
        "=f,f,r,r",
        [scores, bits, bit],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def shown_scores(scores, bits, LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, FINITE: gl.constexpr = False):
    """Scores `[64, BLOCK_N]`, -inf where `bits: [64, 4]` show nothing, or if FINITE -1e30.

    With that no maximum is -inf, and nothing has to be looked at for NaN: what a query adds up that sees no key of a tile is
    multiplied with zero when it sees one, and each query sees the first key of its row.
    """
    even, odd = gl.split(scores.reshape([64, BLOCK_N // 8, 4, 2]))
    HALF: gl.constexpr = even.type.layout
    place = gl.arange(0, BLOCK_N // 8, gl.SliceLayout(0, gl.SliceLayout(2, HALF)))
    first = gl.expand_dims(gl.expand_dims(1 << (place * 2), 0), 2)  # [1, BLOCK_N / 8, 1]
    own = gl.expand_dims(gl.convert_layout(bits, gl.SliceLayout(1, HALF), assert_trivial=True), 1)  # [64, 1, 4]
    even = _shown_where(even, own, first, FINITE)
    odd = _shown_where(odd, own, first * 2, FINITE)
    return gl.convert_layout(gl.join(even, odd).reshape([64, BLOCK_N]), LAYOUT, assert_trivial=True)
