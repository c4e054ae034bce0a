"""PTX of products with quantised weights on the matrix unit, from fragments that are made of codes as they lie in memory.

`mma.m16n8k16` multiplies 16 rows of a weight with 8 tokens. Lane `4 g + t` of a warp gives four columns of rows g and g + 8,
and the same columns of token g; it gets the sums of both rows for tokens 2 t and 2 t + 1. Which columns these are is free as
long as weight and x agree: here they are those that a lane has loaded. So no lane needs what another has, and no weight goes
through shared memory. `groups` of eight tokens share the fragments of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_fastattn.kernels.assembly import FORMS

# A pair of values for each byte of two codes, and each of them for every lane, so that no two lanes read the same bank.
PAIRS, PAIR_STRIDE = 256, 128


def table_assembly(bits: Sequence[int], entries: int) -> str:
    """Fills a table in shared memory with the values of the codes of all bytes; $0 is where the own column of a lane begins.

    Operands: $1 the byte that a thread begins with, $2 its lane, $3 the distance to the next of its `entries` bytes.

    Args:
        bits: the 16 values, of 16 bits each.
        entries: bytes of a thread.
    """
    tables = "".join(
        f"mov.b32 {name}{i}, {word}; "
        for name, shift in (("h", 8), ("l", 0))
        for i, word in enumerate(_words([number >> shift & 255 for number in bits]))
    )
    body = "".join(_entry(number) for number in range(entries))
    return (
        f"{{ .shared .align 128 .b8 pairs[{PAIRS * PAIR_STRIDE}]; "
        ".reg .b32 base, byte, code, late, a, b, h, l, pair, row, at, h0, h1, h2, h3, l0, l1, l2, l3; "
        f"{tables}mov.u32 base, pairs; {body}mad.lo.u32 $0, $2, 4, base; }}"
    )


def _entry(number: int) -> str:
    """Looks up both codes of a byte by permutation, as `nibbles.py` does, and writes them for all lanes."""
    look_up = "".join(
        f"prmt.b32 a, {one}0, {one}1, code; prmt.b32 b, {one}2, {one}3, code; prmt.b32 {one}, a, b, late; " for one in "hl"
    )
    # Eight threads side by side write to eight different groups of banks.
    writes = "".join(
        f"add.u32 at, byte, {part}; and.b32 at, at, 7; mad.lo.u32 at, at, 16, row; "
        "st.shared.v4.b32 [at], {pair, pair, pair, pair}; "
        for part in range(8)
    )
    # The upper code is that of the earlier column.
    return (
        f"mad.lo.u32 byte, $3, {number}, $1; and.b32 code, byte, 0x77; shr.b32 late, byte, 1; and.b32 late, late, 0x44; "
        f"or.b32 late, late, 0x10; {look_up}prmt.b32 pair, l, h, 0x4051; mad.lo.u32 row, byte, {PAIR_STRIDE}, base; {writes}"
    )


def _words(table: Sequence[int]) -> list[str]:
    return [f"0x{sum(table[4 * word + byte] << 8 * byte for byte in range(4)):08x}" for word in range(4)]


def codes_assembly(dtype: str, groups: int) -> str:
    """The sums of 64 columns, 16 of a lane, with values by `table_assembly`: four of each group, from $0 on.

    Operands: 8 bytes of codes of row g, of row g + 8, 8 bytes of x four times for each group, where the table begins.
    """
    sums = 4 * groups
    text = [
        f"{{ .reg .b32 byte, a0, a1, a2, a3, w0, w1, v0, v1, x<{8 * groups}>; "
        f"mov.b64 {{w0, w1}}, ${sums}; mov.b64 {{v0, v1}}, ${sums + 1}; "
    ]
    text += [f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${sums + 2 + i}; " for i in range(4 * groups)]
    text += [f"mov.f32 ${i}, 0f00000000; " for i in range(sums)]
    for number in range(4):
        first = 2 * (number % 2)
        for name, source, byte in (("a0", "w", first), ("a1", "v", first), ("a2", "w", first + 1), ("a3", "v", first + 1)):
            text.append(
                f"bfe.u32 byte, {source}{number // 2}, {8 * byte}, 8; "
                f"mad.lo.u32 byte, byte, {PAIR_STRIDE}, ${2 + 2 * sums}; ld.shared.b32 {name}, [byte]; "
            )
        text += [
            _multiplied(dtype, group, f"x{8 * group + 2 * number}", f"x{8 * group + 2 * number + 1}")
            for group in range(groups)
        ]
    return "".join(text) + "}"


def tile_assembly(groups: int) -> str:
    """The sums of 128 columns of tinygemm's tiles with `128 + q`: four of each group, from $0 on.

    Operands: twice 8 bytes of row g, twice of row g + 8, and 16 words of x for each group.
    """
    sums = 4 * groups
    text = ["{ .reg .b32 late, a0, a1, a2, a3, w0, w1, w2, w3, v0, v1, v2, v3; "]
    text += [
        f"mov.b64 {{{name}{2 * i}, {name}{2 * i + 1}}}, ${sums + 2 * row + i}; "
        for row, name in enumerate("wv") for i in range(2)
    ]  # fmt: skip
    text += [f"mov.f32 ${i}, 0f00000000; " for i in range(sums)]
    for number in range(8):
        first = 2 * (number % 2)
        for name, source, nibble in (("a0", "w", first), ("a1", "v", first), ("a2", "w", first + 1), ("a3", "v", first + 1)):
            # 0x4300 is 128 in bf16, whose last four bits are q.
            text.append(
                f"shr.b32 late, {source}{number // 2}, {4 * nibble}; lop3.b32 {name}, late, 0x000f000f, 0x43004300, 0xea; "
            )
        text += [_of_words(group, sums + 4, number) for group in range(groups)]
    return "".join(text) + "}"


def ones_assembly(groups: int) -> str:
    """The sums of 128 columns of x alone, in the order of `tile_assembly`. Operands: 16 words of x for each group."""
    sums = 4 * groups
    text = ["{ .reg .b32 a0, a1, a2, a3; "]
    text += [f"mov.b32 a{i}, 0x3f803f80; " for i in range(4)]
    text += [f"mov.f32 ${i}, 0f00000000; " for i in range(sums)]
    text += [_of_words(group, sums, number) for number in range(8) for group in range(groups)]
    return "".join(text) + "}"


def _of_words(group: int, first: int, number: int) -> str:
    at = first + 16 * group + 2 * number
    return _multiplied("bf16", group, f"${at}", f"${at + 1}")


def _multiplied(dtype: str, group: int, x0: str, x1: str) -> str:
    """The product of the fragment in a0 to a3 with two words of x, added to the sums of a group."""
    sums = ", ".join(f"${4 * group + i}" for i in range(4))
    form = FORMS[dtype]
    kind = f"mma.sync.aligned.m16n8k16.row.col.f32.{form}.{form}.f32"
    return f"{kind} {{{sums}}}, {{a0, a1, a2, a3}}, {{{x0}, {x1}}}, {{{sums}}}; "
