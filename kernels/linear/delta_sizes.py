"""Which sizes of Gated DeltaNet the kernels take."""

from __future__ import annotations

MAX_DIM = 256


def why_not_sizes(dk: int, dv: int, kernel: int) -> str | None:
    """Why a layer with these head dimensions and this length of the convolution is not taken; None if it is."""
    for dim in (dk, dv):
        if dim & (dim - 1) or not 1 <= dim <= MAX_DIM:
            return f"linear attention with heads of {dim} (the kernels take powers of two up to {MAX_DIM})"
    return None if kernel > 1 else f"a convolution of {kernel} token (the kernels take two and more)"
