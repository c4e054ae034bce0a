"""PTX of products with quantised weights in registers: fragments of the matrix unit made from codes as they lie in memory.

`mma.m16n8k16` multiplies 16 rows of weights with 8 tokens. Lane `4 g + t` of a warp gives four columns of rows g and g + 8 and the
same four of token g, and gets the sums of these rows for tokens 2 t and 2 t + 1. Which columns these are is free, as long as weights
and x agree: those that a lane has loaded at once, so that nothing is exchanged between lanes, nor goes through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence

# Bytes of the table of pairs: one for each byte of two codes, and each for every lane, so that no two lanes share a bank.
PAIR_BYTES = 256 * 128


def table_assembly(bits: Sequence[int], entries: int) -> str:
    """Fills a table in shared memory with the values of each byte's two codes; $0 is the address of this lane's column.

    Args:
        bits: the 16 values, of 16 bits each.
        entries: that a thread fills, those from number $1 on whose numbers differ by $3.
    """
    high, low = _words([number >> 8 for number in bits]), _words([number & 255 for number in bits])
    tables = "".join(f"mov.b32 h{i}, {high[i]}; mov.b32 l{i}, {low[i]}; " for i in range(4))
    filled = []
    for number in range(entries):
        filled.append(
            f"mad.lo.u32 entry, $3, {number}, $1; and.b32 code, entry, 0x77; shr.b32 late, entry, 1; and.b32 late, late, 0x44; "
            "or.b32 late, late, 0x10; prmt.b32 a, h0, h1, code; prmt.b32 b, h2, h3, code; prmt.b32 h, a, b, late; "
            "prmt.b32 a, l0, l1, code; prmt.b32 b, l2, l3, code; prmt.b32 l, a, b, late; prmt.b32 pair, l, h, 0x4051; "
            "mad.lo.u32 row, entry, 128, base; "
        )
        # Eight threads side by side write to eight different groups of banks.
        for part in range(8):
            filled.append(
                f"add.u32 at, entry, {part}; and.b32 at, at, 7; mad.lo.u32 at, at, 16, row; "
                "st.shared.v4.b32 [at], {pair, pair, pair, pair}; "
            )
    return (
        f"{{ .shared .align 128 .b8 pairs[{PAIR_BYTES}]; .reg .b32 base, entry, code, late, a, b, h, l, pair, row, at; "
        f".reg .b32 h0, h1, h2, h3, l0, l1, l2, l3; {tables}mov.u32 base, pairs; {''.join(filled)}"
        "mad.lo.u32 $0, $2, 4, base; }"
    )


def _words(table: Sequence[int]) -> list[str]:
    return [f"0x{sum(table[4 * word + byte] << 8 * byte for byte in range(4)):08x}" for word in range(4)]


def codes_assembly(form: str, groups: int) -> str:
    """Sums of 64 columns, 16 of a lane, for `groups` of eight tokens, four numbers each from $0 on.

    Operands: 8 bytes of codes of row g, of row g + 8, 8 bytes of x four times a group, and the address of `table_assembly`.

    Args:
        form: `"bf16"` or `"f16"`, of x and of the values.
    """
    sums = 4 * groups
    low, high, first, table = f"${sums}", f"${sums + 1}", sums + 2, f"${sums + 2 + 4 * groups}"
    text = [
        f"{{ .reg .b32 i, w0, w1, v0, v1, a0, a1, a2, a3; .reg .b32 x<{8 * groups}>; mov.b64 {{w0, w1}}, {low}; "
        f"mov.b64 {{v0, v1}}, {high}; "
    ]
    text += [f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${first + i}; " for i in range(4 * groups)]
    text += [f"mov.f32 ${i}, 0f00000000; " for i in range(sums)]
    for word in range(2):
        for half in range(2):
            for name, source, byte in (("a0", "w", 0), ("a1", "v", 0), ("a2", "w", 1), ("a3", "v", 1)):
                text.append(
                    f"bfe.u32 i, {source}{word}, {8 * (2 * half + byte)}, 8; mad.lo.u32 i, i, 128, {table}; ld.shared.b32 {name}, [i]; "
                )
            text += [multiplied(form, 4 * group, f"x{8 * group + 4 * word + 2 * half}", f"x{8 * group + 4 * word + 2 * half + 1}") for group in range(groups)]
    return "".join(text) + "}"


def permuted_assembly(form: str, groups: int, bits) -> str:
    sums = 4 * groups
    low, high, first, table = f"${sums}", f"${sums + 1}", sums + 2, f"${sums + 2 + 4 * groups}"
    hi, lo = _words([number >> 8 for number in bits]), _words([number & 255 for number in bits])
    tables = "".join(f"mov.b32 h{i}, {hi[i]}; mov.b32 l{i}, {lo[i]}; " for i in range(4))
    text = [
        f"{{ .reg .b32 code, late, a, b, h, l, w0, w1, v0, v1, a0, a1, a2, a3; .reg .b32 h0, h1, h2, h3, l0, l1, l2, l3; .reg .b32 x<{8 * groups}>; mov.b64 {{w0, w1}}, {low}; "
        f"mov.b64 {{v0, v1}}, {high}; {tables}"
    ]
    text += [f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${first + i}; " for i in range(4 * groups)]
    text += [f"mov.f32 ${i}, 0f00000000; " for i in range(sums)]
    for word in range(2):
        for half in range(2):
            for source, names in (("w", ("a0", "a2")), ("v", ("a1", "a3"))):
                text.append(
                    f"shr.b32 code, {source}{word}, {16 * half}; shr.b32 late, code, 1; and.b32 code, code, 0x7777; and.b32 late, late, 0x4444; or.b32 late, late, 0x3210; "
                    "prmt.b32 a, h0, h1, code; prmt.b32 b, h2, h3, code; prmt.b32 h, a, b, late; "
                    "prmt.b32 a, l0, l1, code; prmt.b32 b, l2, l3, code; prmt.b32 l, a, b, late; "
                    f"prmt.b32 {names[0]}, l, h, 0x4051; prmt.b32 {names[1]}, l, h, 0x6273; "
                )
            text += [multiplied(form, 4 * group, f"x{8 * group + 4 * word + 2 * half}", f"x{8 * group + 4 * word + 2 * half + 1}") for group in range(groups)]
    return "".join(text) + "}"


def multiplied(form: str, sums: int, x0: str, x1: str) -> str:
    """A product of the weights in a0 to a3 with two words of x, added to the four sums from number `sums` on."""
    c = ", ".join(f"${sums + i}" for i in range(4))
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{form}.{form}.f32 {{{c}}}, {{a0, a1, a2, a3}}, {{{x0}, {x1}}}, {{{c}}}; "


def tile_assembly(groups: int, ones: bool) -> str:
    """Sums of 128 columns with `128 + q`, or, if `ones`, with 1: for `groups` of eight tokens, four numbers each from $0 on.

    Operands: two times 8 bytes of row g and of row g + 8 (not if `ones`), and 16 words of x of each group.
    """
    sums = 4 * groups
    first = sums if ones else sums + 4
    text = ["{ .reg .b32 s, a0, a1, a2, a3, w0, w1, w2, w3, v0, v1, v2, v3; "]
    if ones:
        text.append("".join(f"mov.b32 a{i}, 0x3f803f80; " for i in range(4)))
    else:
        text += [f"mov.b64 {{w{2 * i}, w{2 * i + 1}}}, ${sums + i}; mov.b64 {{v{2 * i}, v{2 * i + 1}}}, ${sums + 2 + i}; " for i in range(2)]
    text += [f"mov.f32 ${i}, 0f00000000; " for i in range(sums)]
    for word in range(4):
        for half in range(2):
            if not ones:
                for name, source, nibble in (("a0", "w", 0), ("a1", "v", 0), ("a2", "w", 1), ("a3", "v", 1)):
                    text.append(
                        f"shr.b32 s, {source}{word}, {4 * (2 * half + nibble)}; "
                        f"lop3.b32 {name}, s, 0x000f000f, 0x43004300, 0xea; "
                    )
            step = 2 * word + half
            text += [
                multiplied("bf16", 4 * group, f"${first + 16 * group + 2 * step}", f"${first + 16 * group + 2 * step + 1}")
                for group in range(groups)
            ]
    return "".join(text) + "}"
