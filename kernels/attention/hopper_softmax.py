"""The softmax of a tile in the Gluon prefill, with a variant's score function and mask.

`pairs` is what these get: row, query heads `[64]`, positions `[64]`, window and tensors; and the first head and position.
MASK is 0 for a tile that is seen wholly, else 1; then `shown` are its `hopper_shown.shown_bits`, which there are with a mask
or a window; without, causality and the row's end hide something. If it is 2, they hide something of a tile that is `masked`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_fastattn.kernels.attention.hopper_registers import power_of_two, reciprocal, row_maxima
from hf_fastattn.kernels.attention.hopper_shown import shown_keys, shown_scores
from hf_fastattn.kernels.launch import LOG2E as LOG2E_FLOAT

LOG2E = gl.constexpr(LOG2E_FLOAT)


@gluon.jit
def values_of_distances(first_key, pairs, CFG: gl.constexpr, HOOKS: gl.constexpr):
    """What the score function makes of the distances of a tile, `[DISTANCES * PACKED]`, or 0 without such.

    Heads innermost, so that the threads of a warp look up neighbours, of different banks.
    """
    if HOOKS.score_by_distance is None:
        return 0
    else:
        b, h, q_idx, window, tensors, head, first_position = pairs
        BLOCK_N: gl.constexpr = CFG[1]
        PACKED: gl.constexpr = CFG[6]
        at = gl.arange(0, CFG[7] * PACKED, gl.BlockedLayout([1], [32], [4], [0]))
        distance = at // PACKED + (first_position - first_key - (BLOCK_N - 1))
        return HOOKS.score_by_distance(b, head + at % PACKED, distance, tensors)


@gluon.jit
def _values_of_pairs(by_distance, LAYOUT: gl.constexpr, CFG: gl.constexpr):
    """Of the values of `values_of_distances` that of each pair, `[64, BLOCK_N]`, through shared memory."""
    BLOCK_N: gl.constexpr = CFG[1]
    PACKED: gl.constexpr = CFG[6]
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), 1)
    column = gl.expand_dims(gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)), 0)
    at = row + (BLOCK_N - 1 - column) * PACKED
    found = gl.gather(by_distance, at.reshape([64 * BLOCK_N]), 0)
    return gl.convert_layout(found.reshape([64, BLOCK_N]), LAYOUT, assert_trivial=True)


@gluon.jit
def softmax_step(
    scores, row_max, scale, last_key, first_key, pairs, by_distance, shown, masked, CFG: gl.constexpr,
    LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, MASK: gl.constexpr, HOOKS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over scores `[64, BLOCK_N]`, in base 2.

    Returns:
        Weights `[64, BLOCK_N]`, the factor for the sums so far `[64]`, and the new maximum `[64]`.
    """
    b, h, q_idx, window, tensors, head, first_position = pairs
    # A score function may hide all that causality shows.
    PLAIN: gl.constexpr = HOOKS.score_mod is None and HOOKS.score_rest is None
    if HOOKS.score_rest is not None:
        key = gl.expand_dims(first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)), 0)
        if HOOKS.score_by_distance is not None:
            by_distance = _values_of_pairs(by_distance, LAYOUT, CFG)
        scores = HOOKS.score_rest(
            scores * scale, by_distance, b, gl.expand_dims(h, 1), gl.expand_dims(q_idx, 1), key, tensors
        )
        scale = HOOKS.last_factor * LOG2E
    elif HOOKS.score_mod is not None:
        key = gl.expand_dims(first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)), 0)
        scores = HOOKS.score_mod(scores * scale, b, gl.expand_dims(h, 1), gl.expand_dims(q_idx, 1), key, tensors)
        scale = LOG2E
    if MASK == 2:
        if masked:
            keys = shown_keys(last_key - first_key, LAYOUT, BLOCK_N)
            scores = shown_scores(scores, keys, LAYOUT, BLOCK_N, PLAIN)
    elif MASK == 1:
        if HOOKS.mask_mod is None and window is None:
            shown = shown_keys(last_key - first_key, LAYOUT, BLOCK_N)
        scores = shown_scores(scores, shown, LAYOUT, BLOCK_N)
    if HOOKS.sigmoid:
        # Added up as they are.
        weights = reciprocal(1.0 + power_of_two(scores * -scale))
        new_max = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
        return weights, new_max + 1.0, new_max
    else:
        new_max = gl.maximum(row_max, row_maxima(scores, LAYOUT) * scale)
        if MASK == 1 or (MASK == 2 and not PLAIN):
            # Without this, a query that has seen no key yet would give -inf - -inf = NaN.
            shift = gl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            shift = new_max
        weights = power_of_two(scores * scale - gl.expand_dims(shift, 1))
        return weights, power_of_two(row_max - shift), new_max
