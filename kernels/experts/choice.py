"""The experts of greatest score, and their weights, from the router's logits; called by the kernels of `router.py`.

A score and the index of its expert make one 64-bit key, the score's bits above: scores are not negative, so bits order as
they do. The greatest key is the greatest score, and of equal scores that of the lowest index, whatever the order in which
keys are compared. NaN is above all numbers, as for `torch.topk`.
"""

from __future__ import annotations

import triton
import triton.language as tl

INDEX = tl.constexpr(0x7FFFFFFF)
NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def scores_of(logits, ok, SIGMOID: tl.constexpr):
    """Softmax over the experts, or the sigmoid of each: `[BLOCK_T, BLOCK_E]` in fp32, from logits in fp32."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logits))
    logits = tl.where(ok[None, :], logits, -float("inf"))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def choose(logits, ok, K: tl.constexpr, BLOCK_K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr):
    """Experts `[BLOCK_T, BLOCK_K]`, their weights, and which experts each token chose, `[BLOCK_T, BLOCK_E]`.

    `ok: [BLOCK_E]` says which columns of `logits: [BLOCK_T, BLOCK_E]` are experts; there are K of them at least.
    """
    e = tl.arange(0, logits.shape[1])  # [BLOCK_E]
    k = tl.arange(0, BLOCK_K)
    scores = scores_of(logits, ok, SIGMOID)
    bits = tl.where(scores != scores, NAN_BITS, scores.to(tl.int32, bitcast=True))
    keys = (bits.to(tl.int64) << 32) | (~e & INDEX).to(tl.int64)[None, :]
    keys = tl.where(ok[None, :], keys, -1)
    chosen = tl.zeros([logits.shape[0], BLOCK_K], tl.int32)
    weights = tl.zeros([logits.shape[0], BLOCK_K], tl.float32)
    for number in tl.range(0, K):
        best = tl.max(keys, 1)  # [BLOCK_T]
        at = (~best & INDEX).to(tl.int32)
        here = (k == number)[None, :]
        chosen = tl.where(here, at[:, None], chosen)
        weights = tl.where(here, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)[:, None], weights)
        keys = tl.where(e[None, :] == at[:, None], -1, keys)
    if NORMALISE:
        weights = weights / tl.sum(weights, 1)[:, None]
    return chosen, weights, (keys < 0) & ok[None, :]
