"""The inner step that every attention kernel shares: scores of a tile, and the online softmax over tiles.

The running state of the online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022, "FlashAttention") is kept in
base 2, since exp2 is what the hardware computes: `row_max` is of `score * log2(e)`, `row_sum` of its `exp2`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.launch import LOG2E


@triton.jit
def _halves(x):
    """`[M, D]` as two `[M, D / 2]`."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _two_products(q, k):
    q0, q1 = _halves(q)
    k0, k1 = _halves(k)
    return tl.dot(q0, tl.trans(k0), input_precision="ieee") + tl.dot(q1, tl.trans(k1), input_precision="ieee")


@triton.jit
def _four_products(q, k):
    q0, q1 = _halves(q)
    k0, k1 = _halves(k)
    return _two_products(q0, k0) + _two_products(q1, k1)


@triton.jit
def _fp32_products(q, k):
    """`q k^T` in fp32. One long chain of additions would err more than PyTorch's tree, so short ones are added up."""
    if q.shape[1] >= 128:
        q0, q1 = _halves(q)
        k0, k1 = _halves(k)
        scores = _four_products(q0, k0) + _four_products(q1, k1)
    elif q.shape[1] == 64:
        scores = _four_products(q, k)
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    return scores


@triton.jit
def tile_scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores `[BLOCK_M, BLOCK_N]` of `q: [BLOCK_M, D]` and `k: [BLOCK_N, D]`, raw, or with a softcap in base 2."""
    if PRECISION == "ieee":
        scores = _fp32_products(q, k)
    else:
        scores = tl.dot(q, tl.trans(k))
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)) holds at both ends, but near 0 its error is that of the 1.
        scores = scores * scale
        capped = 1.0 - 2.0 / (1.0 + tl.math.exp2(scores))
        if PRECISION == "ieee":
            # Fitted to (tanh(x) / x - 1) / x^2 for |x| < 0.6, to less than fp32 rounds.
            x = scores * 0.34657359027997264
            x2 = x * x
            fitted = 0.13331915 + x2 * (-0.053783294 + x2 * (0.020794617 + x2 * -0.005893945))
            capped = tl.where(x2 < 0.36, x + x * (x2 * (-0.333333 + x2 * fitted)), capped)
        scores = softcap * capped
    return scores


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """`scale` and `softcap` as the kernels want them, with the factors of base 2 and of tanh folded in.

    Raises:
        ValueError: one of them is not positive.
    """
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale={scale} and softcap={softcap} must be positive")
    if softcap is None:
        return scale * LOG2E, 0.0
    return 2.0 * scale / softcap * LOG2E, softcap * LOG2E


@triton.jit
def softmax_step(scores, v, row_max, row_sum, acc, scale, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """The state after one more tile of scores `[BLOCK_M, BLOCK_N]`, -inf where hidden, and values `[BLOCK_N, D]`."""
    factor = 1.0 if HAS_SOFTCAP else scale
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    # A row that has seen no key yet would give -inf - -inf.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    # One fused multiply-add: large scores are not rounded before the maximum is taken off.
    weights = tl.math.exp2(scores * factor - shift[:, None])
    decay = tl.math.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def softmax_end(row_max, row_sum, acc):
    """Output `[BLOCK_M, D]` and LSE, natural logarithm; 0 and -inf for a row without a visible key."""
    seen = row_sum > 0
    out = acc * tl.where(seen, 1.0 / row_sum, 0.0)[:, None]
    return out, tl.where(seen, (row_max + tl.math.log2(row_sum)) * 0.6931471805599453, float("-inf"))
