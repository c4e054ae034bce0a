"""Equal ranges of a flat list for persistent programs: which program a unit belongs to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_of(unit, share, extra):
    """The program whose range holds `unit`: the first `extra` ranges are `share + 1` long, the others `share`."""
    long = extra * (share + 1)
    return tl.where(unit < long, unit // (share + 1), extra + (unit - long) // tl.maximum(share, 1))
