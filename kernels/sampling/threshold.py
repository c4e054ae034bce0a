"""The least score that top-k, top-p and min-p keep, found without sorting.

The bits of a float, read as an integer with all but the sign flipped if negative, are ordered as the floats are: a key. The
k-th largest score has the largest key that at least k scores reach; top-p's last score has the largest key such that the
scores that reach it hold a mass of p. Both are found by bisection. Keys are made from logits, with 16 bits for 16-bit
logits; what is kept is decided by the *scaled* score, in which different logits may be equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.sampling.scores import LARGEST, LOG2E, load_scores


@triton.jit
def order_key(x, SHIFT: tl.constexpr):
    """fp32 to int32, in the same order; the SHIFT low bits of the floats, which are all zero, are dropped."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def key_score(key, SHIFT: tl.constexpr):
    """The fp32 of a key."""
    wide = key << SHIFT
    wide |= (wide >> 31) & ((1 << SHIFT) - 1)
    return (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    # (low + high) // 2 without overflow.
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def search_block(keys, weights, low, high, need):
    """The largest key in `[low, high)` such that the weights (fp32) of all `keys` from it on sum to at least `need`.

    It is assumed that `low` satisfies this and `high` does not.
    """
    middle = _middle(low, high)
    while middle != low:
        enough = tl.sum(tl.where(keys >= middle, weights, 0.0), 0) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        middle = _middle(low, high)
    return low


@triton.jit
def masses(x, z, least, peak, scale):
    """`exp2((x - peak) * scale)`, 0 for scaled scores z below `least`; `peak` is finite."""
    return tl.where(z >= least, tl.exp2((x - peak) * scale), 0.0)


@triton.jit
def _by_four(x, TILE: tl.constexpr):
    """`[TILE]` to `[TILE // 4]`: sums of four neighbours, which one thread holds, to save registers of accumulators."""
    return tl.sum(tl.reshape(x, [TILE // 4, 4]), 1)


@triton.jit
def _row_sums(
    row_ptr, vocab, inverse, least, peak, scale, key1, key2, key3,
    BY_MASS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mass (with `least` as lowest scaled score), or else number, of the scores with keys from `key1`, `key2`, `key3` on."""
    sum1 = tl.zeros([TILE // 4], tl.float32)
    sum2, sum3 = sum1, sum1
    for begin in range(0, vocab, TILE):
        token = begin + tl.arange(0, TILE)  # [TILE]
        ok = token < vocab
        x = load_scores(row_ptr, token, ok)
        weight = ok.to(tl.float32)
        if BY_MASS:
            weight = masses(x, x * inverse, least, peak, scale)
        key = order_key(x, SHIFT)
        sum1 += _by_four(tl.where(key >= key1, weight, 0.0), TILE)
        sum2 += _by_four(tl.where(key >= key2, weight, 0.0), TILE)
        sum3 += _by_four(tl.where(key >= key3, weight, 0.0), TILE)
    return tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum3, 0)


@triton.jit
def search_row(
    row_ptr, vocab, inverse, least, peak, scale, low, high, need,
    BY_MASS: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`search_block` over a whole row of logits: each pass over the row decides two bits of the key."""
    middle = _middle(low, high)
    while middle != low:
        key1, key3 = _middle(low, middle), _middle(middle, high)
        sum1, sum2, sum3 = _row_sums(
            row_ptr, vocab, inverse, least, peak, scale, key1, middle, key3, BY_MASS, SHIFT, TILE
        )  # fmt: skip
        high = tl.where(sum1 < need, key1, tl.where(sum2 < need, middle, tl.where(sum3 < need, key3, high)))
        low = tl.where(sum3 >= need, key3, tl.where(sum2 >= need, middle, tl.where(sum1 >= need, key1, low)))
        middle = _middle(low, high)
    return low


@triton.jit
def row_threshold(
    row_ptr, vocab, inverse, peak, top_k, top_p, SHIFT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The least scaled score that top-k and top-p keep, from a whole row; `peak` is its largest logit."""
    finite = tl.maximum(peak, -LARGEST)
    scale = inverse * LOG2E
    high = order_key(peak, SHIFT) + 1
    lowest = order_key(tl.full([], float("-inf"), tl.float32), SHIFT)
    low = lowest
    least = tl.full([], float("-inf"), tl.float32)
    if top_k > 0:
        low = search_row(row_ptr, vocab, inverse, least, finite, scale, low, high, top_k, False, SHIFT, TILE)
        least = key_score(low, SHIFT) * inverse
    if top_p < 1.0:
        mass, _, _ = _row_sums(
            row_ptr, vocab, inverse, least, finite, scale, lowest, lowest, lowest, True, SHIFT, TILE
        )  # fmt: skip
        need = top_p * mass
        # A lower bound to start from: all scores below it together hold less than half of the mass that top-p drops.
        tail = finite + tl.log((1.0 - top_p) / (2.0 * vocab)) / inverse
        low = tl.minimum(tl.maximum(low, order_key(tail, SHIFT)), high - 1)
        low = search_row(row_ptr, vocab, inverse, least, finite, scale, low, high, need, True, SHIFT, TILE)
        least = tl.maximum(least, key_score(low, SHIFT) * inverse)
    return least
