"""RoPE inside the attention kernels (`variants.rotation.RotaryFrequencies`): queries and keys rotated as they are read.

Keys that come rotated in runs no shorter than a tile are rotated alike in it: their few queries are turned back instead,
once a tile, and keys cost no arithmetic (`query_of_runs`, `query_for_tile`). For many queries, and short runs, keys are
rotated (`rotated_query`, `rotated_keys`).

Rotation pairs element `i` of a head with element `i + HALF`, so both are held as blocks of their own, `[.., HALF]` each, and
scores are the sum of two products: nothing moves between threads. The angle of key `base + n` of a tile is the angle of
`base`, a vector for the tile, plus that of `n`, which is the same for all tiles: by the addition theorem keys cost no memory
traffic but their own, where tables by position would take as many bytes as the keys.

`table_ptr` is the table of `RotaryFrequencies`, whose method `blocks` says how heads are cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.variants.rotation import FINE as FINE_POSITIONS

FINE = tl.constexpr(FINE_POSITIONS)
# Packed queries of a tile up to which these are turned for each tile of keys, if keys come rotated in runs.
MOST_TURNED = tl.constexpr(16)


@triton.jit
def _turned(cos, sin, more_cos, more_sin):
    """Cosine and sine of the sum of two angles."""
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin


@triton.jit
def _angle(table_ptr, position, half, HALF: tl.constexpr):
    """Cosine and sine of the angles of pairs `half` at positions; both broadcast to the shape of the result."""
    ok = half < HALF
    # Elsewhere the angle is 0.
    fine = table_ptr + position % FINE * (2 * HALF) + half
    coarse = table_ptr + (FINE + position // FINE) * (2 * HALF) + half
    cos = tl.load(fine, mask=ok, other=1.0)
    sin = tl.load(fine + HALF, mask=ok, other=0.0)
    return _turned(cos, sin, tl.load(coarse, mask=ok, other=1.0), tl.load(coarse + HALF, mask=ok, other=0.0))


@triton.jit
def _angle_of_columns(table_ptr, position, d, HOOKS: tl.constexpr):
    """`_angle` of the columns `d` of whole heads: 0 for those that are not rotated."""
    HALF: tl.constexpr = HOOKS.rotated // 2
    return _angle(table_ptr, position, tl.where(d < 2 * HALF, d % HALF, HALF), HALF)


@triton.jit
def query_of_runs(q, q_ptr, ok_m, q_idx, table_ptr, HOOKS: tl.constexpr, D: tl.constexpr):
    """For keys that come rotated in runs no shorter than tiles: queries `q: [M, BLOCK_D]` rotated to where their runs begin.

    In fp32, and after a quarter turn, with which they can be turned further.
    """
    HALF: tl.constexpr = HOOKS.rotated // 2
    d = tl.arange(0, q.shape[1])
    # What a column is rotated with, and the sign of rotate_half.
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    sign = tl.where(d < HALF, -1.0, tl.where(d < 2 * HALF, 1.0, 0.0))
    across = tl.load(q_ptr[:, None] + partner[None, :], mask=ok_m[:, None] & (d < D)[None, :], other=0.0)
    across = across.to(tl.float32) * sign[None, :]
    own = q.to(tl.float32)
    cos, sin = _angle_of_columns(table_ptr, (q_idx - q_idx % HOOKS.run)[:, None], d[None, :], HOOKS)
    factor = tl.where(d < 2 * HALF, HOOKS.rotation_factor, 1.0)[None, :]
    return (own * cos + across * sin) * factor, (across * cos - own * sin) * factor


@triton.jit
def query_for_tile(q, key, table_ptr, HOOKS: tl.constexpr, DTYPE: tl.constexpr):
    """What `query_of_runs` gives, turned back by where the run of the keys from `key` on begins: `[M, BLOCK_D]`."""
    cos, sin = _angle_of_columns(table_ptr, key - key % HOOKS.run, tl.arange(0, q[0].shape[1]), HOOKS)
    return (q[0] * cos[None, :] - q[1] * sin[None, :]).to(DTYPE)


@triton.jit
def rotated_query(q_ptr, ok_m, q_idx, table_ptr, HOOKS: tl.constexpr, D: tl.constexpr):
    """Queries at `q_ptr: [M]` rotated to positions `q_idx: [M]`: their first and second halves, and what is not rotated.

    All have the dtype of q. The rest is the first half again where the whole head is rotated.
    """
    HALF: tl.constexpr = HOOKS.rotated // 2
    REST: tl.constexpr = D - 2 * HALF
    BLOCK_HALF: tl.constexpr = HOOKS.block_half
    q_idx = q_idx - q_idx % HOOKS.run
    half = tl.arange(0, BLOCK_HALF)
    ok = ok_m[:, None] & (half < HALF)[None, :]
    base = q_ptr[:, None] + half[None, :]
    q1 = tl.load(base, mask=ok, other=0.0)
    q2 = tl.load(base + HALF, mask=ok, other=0.0)
    cos, sin = _angle(table_ptr, q_idx[:, None], half[None, :], HALF)
    # The factor of the keys too: a product of two vectors is what is wanted of them.
    first = (q1.to(tl.float32) * cos - q2.to(tl.float32) * sin) * HOOKS.rotation_factor
    second = (q2.to(tl.float32) * cos + q1.to(tl.float32) * sin) * HOOKS.rotation_factor
    first = first.to(q1.dtype)
    rest = first
    if REST > 0:
        BLOCK_REST: tl.constexpr = HOOKS.block_rest
        column = tl.arange(0, BLOCK_REST)
        ok = ok_m[:, None] & (column < REST)[None, :]
        rest = tl.load(q_ptr[:, None] + 2 * HALF + column[None, :], mask=ok, other=0.0)
    return first, second.to(q1.dtype), rest


@triton.jit
def tile_angles(table_ptr, HOOKS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cosine and sine `[BLOCK_N, BLOCK_HALF]` of the keys of a tile that begins at position 0."""
    HALF: tl.constexpr = HOOKS.rotated // 2
    half = tl.arange(0, HOOKS.block_half)[None, :]
    n = tl.arange(0, BLOCK_N)
    base = table_ptr + (n - n % HOOKS.run)[:, None] * (2 * HALF) + half
    ok = half < HALF
    return tl.load(base, mask=ok, other=1.0), tl.load(base + HALF, mask=ok, other=0.0)


@triton.jit
def _load_keys(base, ok_n, ok_column, EDGE: tl.constexpr, PADDED: tl.constexpr):
    """Keys at `base: [BLOCK_N, BLOCK]`: with EDGE those that are `ok_n`, with PADDED the columns that are there, else 0."""
    if EDGE:
        keys = tl.load(base, mask=ok_n[:, None] & ok_column[None, :], other=0.0)
    elif PADDED:
        keys = tl.load(base, mask=ok_column[None, :], other=0.0)
    else:
        keys = tl.load(base)
    return keys


@triton.jit
def rotated_keys(k_ptr, ok_n, key, near_cos, near_sin, table_ptr, EDGE: tl.constexpr, HOOKS: tl.constexpr):
    """Keys at `k_ptr: [BLOCK_N]`, rotated to the positions from `key` on: their first and second halves.

    Without `near_cos` all of them are in one run.
    """
    HALF: tl.constexpr = HOOKS.rotated // 2
    half = tl.arange(0, HOOKS.block_half)
    base = k_ptr[:, None] + half[None, :]
    PADDED: tl.constexpr = HALF < HOOKS.block_half
    k1 = _load_keys(base, ok_n, half < HALF, EDGE, PADDED)
    k2 = _load_keys(base + HALF, ok_n, half < HALF, EDGE, PADDED)
    far_cos, far_sin = _angle(table_ptr, key - key % HOOKS.run, half, HALF)  # [BLOCK_HALF]
    if near_cos is None:
        cos, sin = far_cos[None, :], far_sin[None, :]
    else:
        cos, sin = _turned(near_cos, near_sin, far_cos[None, :], far_sin[None, :])
    first = k1.to(tl.float32) * cos - k2.to(tl.float32) * sin
    second = k2.to(tl.float32) * cos + k1.to(tl.float32) * sin
    return first.to(k1.dtype), second.to(k1.dtype)


@triton.jit
def unrotated_keys(k_ptr, ok_n, EDGE: tl.constexpr, HOOKS: tl.constexpr, D: tl.constexpr):
    """The columns of keys at `k_ptr: [BLOCK_N]` that are not rotated."""
    REST: tl.constexpr = D - HOOKS.rotated
    column = tl.arange(0, HOOKS.block_rest)
    base = k_ptr[:, None] + HOOKS.rotated + column[None, :]
    return _load_keys(base, ok_n, column < REST, EDGE, REST < HOOKS.block_rest)
