"""What the attention kernels share: scores of a tile, the online softmax over tiles, and the merging of its states.

The running state of the online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022, "FlashAttention") is kept in
base 2, since exp2 is what the hardware computes: `row_max` is the maximum of `score * log2(e)`, `row_sum` the sum of
`exp2(score * log2(e) - row_max)`, and `acc` the sum of the values with these weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.attention.hooked import LOG2E as TO_BASE_2
from hf_fastattn.kernels.attention.hooked import (
    hooked_keys,
    hooked_mask,
    hooked_output,
    hooked_scores,
    hooked_sink,
    sigmoid_step,
)
from hf_fastattn.kernels.attention.rotated import MOST_TURNED, query_for_tile, rotated_keys, tile_angles, unrotated_keys
from hf_fastattn.kernels.attention.visited import MASK_HIDES_NOTHING, number_of
from hf_fastattn.kernels.launch import LOG2E
from hf_fastattn.kernels.variants.hooks import NO_HOOKS, Hooks


@triton.jit
def _halves(x):
    """`[M, D]` as two `[M, D / 2]`: the first and the last columns."""
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
    """`q k^T` in fp32, as a tree of short chains of additions: one long chain would err more than PyTorch's sum."""
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
def _query_key_products(q, k, PRECISION: tl.constexpr):
    if PRECISION == "ieee":
        scores = _fp32_products(q, k)
    else:
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return scores


@triton.jit
def tile_scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, factors=None):
    """Scores `[BLOCK_M, BLOCK_N]` of `q: [BLOCK_M, D]` and `k: [BLOCK_N, D]`, raw, or with a softcap in base 2.

    `factors`, which broadcast to them, if given, are what products with 8-bit keys are to be multiplied with.
    """
    scores = _query_key_products(q, k, PRECISION)
    if factors is not None:
        scores = scores * factors
    return _capped(scores, scale, softcap, HAS_SOFTCAP, PRECISION)


@triton.jit
def _rotated_scores(
    q, k_ptr, ok_n, key, near_cos, near_sin, tensors, scale, softcap,
    D: tl.constexpr, EDGE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
):  # fmt: skip
    """`tile_scores` of rotated queries, in parts, and keys at `k_ptr: [BLOCK_N]`, which are rotated here; see `rotated`."""
    k1, k2 = rotated_keys(k_ptr, ok_n, key, near_cos, near_sin, tensors[HOOKS.rotation_table], EDGE, HOOKS)
    if PRECISION == "ieee":
        scores = _query_key_products(q[0], k1, PRECISION) + _query_key_products(q[1], k2, PRECISION)
        if D > HOOKS.rotated:
            scores += _query_key_products(q[2], unrotated_keys(k_ptr, ok_n, EDGE, HOOKS, D), PRECISION)
    else:
        scores = tl.dot(q[0], tl.trans(k1), input_precision=PRECISION)
        scores = tl.dot(q[1], tl.trans(k2), scores, input_precision=PRECISION)
        if D > HOOKS.rotated:
            rest = unrotated_keys(k_ptr, ok_n, EDGE, HOOKS, D)
            scores = tl.dot(q[2], tl.trans(rest), scores, input_precision=PRECISION)
    return _capped(scores, scale, softcap, HAS_SOFTCAP, PRECISION)


@triton.jit
def _capped(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Raw scores as they are, or with a softcap in base 2."""
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2 x)) does not overflow, but near 0 its absolute error is that of rounding 1.
        scores = scores * scale
        capped = 1.0 - 2.0 / (1.0 + tl.math.exp2(scores))
        if PRECISION != "tf32":
            # Polynomial fit of (tanh(x) / x - 1) / x^2 for |x| < 0.6, with an error below fp32 rounding.
            x = scores * 0.34657359027997264
            x2 = x * x
            fitted = 0.13331915 + x2 * (-0.053783294 + x2 * (0.020794617 + x2 * -0.005893945))
            capped = tl.where(x2 < 0.36, x + x * (x2 * (-0.333333 + x2 * fitted)), capped)
        scores = softcap * capped
    return scores


def score_factors(scale: float, softcap: float | None, hooks: Hooks = NO_HOOKS) -> tuple[float, float]:
    """`scale` and `softcap` as the kernels want them, with the factors of base 2 and of tanh folded in.

    Raises:
        ValueError: one of them is not positive, or both a softcap and a score function of a variant are given.
    """
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale={scale} and softcap={softcap} must be positive")
    if hooks.score_mod is not None:
        if softcap is not None:
            raise ValueError(f"softcap={softcap} and a variant that changes scores: give it as Variant(softcap={softcap})")
        return scale * hooks.factor, 0.0
    if softcap is None:
        return scale * LOG2E, 0.0
    return 2.0 * scale / softcap * LOG2E, softcap * LOG2E


@triton.jit
def empty_state(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state before any key: `row_max: [ROWS]`, `row_sum: [ROWS]` and `acc: [ROWS, BLOCK_D]`."""
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    return row_max, row_sum, acc


@triton.jit
def softmax_step(scores, v, row_max, row_sum, acc, scale, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """The state after one more tile of scores `[BLOCK_M, BLOCK_N]`, -inf where hidden, and values `[BLOCK_N, D]`."""
    factor = 1.0 if HAS_SOFTCAP else scale
    new_max, decay, weights = softmax_weights(scores, row_max, factor, factor)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def softmax_weights(scores, row_max, factor, factor_m):
    """The new maximum `[BLOCK_M]`, the decay of sums so far, and the weights of scores `[BLOCK_M, BLOCK_N]` times `factor`.

    `factor` is a number, or one for each row `[BLOCK_M]`; `factor_m` the same, as scores are multiplied with it.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
    # Without this, a query that has seen no key yet would give -inf - -inf = NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    # One fused multiply-add: large scores are not rounded before the maximum is subtracted.
    weights = tl.math.exp2(scores * factor_m - shift[:, None])
    decay = tl.math.exp2(row_max - shift)
    return new_max, decay, weights


@triton.jit
def attend_tiles(
    q, row_max, row_sum, acc, lo, hi, k_ptr, v_ptr, table, head_offset, last_key, lowest, length, window, scale, softcap,
    stride_page, stride_slot, b, head, h, q_idx, tensors,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EDGE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
    listed=None, MASKED: tl.constexpr = True, BY_MARK: tl.constexpr = False,
):  # fmt: skip
    """The state of `q: [BLOCK_M, BLOCK_D]` after the keys of one row in the tiles from `lo` on that begin below `hi`.

    If a list of tiles is given, these are its entries from `lo` to before `hi`. Without MASKED, a variant's mask hides none;
    BY_MARK, it is evaluated only in tiles of the list that are not marked with MASK_HIDES_NOTHING.
    `table` is the row of the page table, `last_key: [BLOCK_M]` the last key that each query sees. With EDGE, keys below
    `lowest`, from `length` on, past `last_key` or outside a query's window are masked; without, every query sees all keys.
    `b`, the kv head `head`, `h: [BLOCK_M]`, `q_idx: [BLOCK_M]` and `tensors` are what a variant's functions get. Where RoPE
    is inside, `q` is what `hooked.hooked_query` gives.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    TURNED: tl.constexpr = HOOKS.rotated > 0 and HOOKS.run >= BLOCK_N and row_max.shape[0] <= MOST_TURNED
    near_cos = None
    near_sin = None
    if HOOKS.rotated > 0 and HOOKS.run < BLOCK_N:
        near_cos, near_sin = tile_angles(tensors[HOOKS.rotation_table], HOOKS, BLOCK_N)
    for at in tl.range(lo, hi, BLOCK_N if listed is None else 1, num_stages=STAGES):
        key = at
        if listed is not None:
            entry = tl.load(listed + at)
            key = number_of(entry) * BLOCK_N
        key_n = key + n  # [BLOCK_N]
        if EDGE:
            ok_n = (key_n < length) & (key_n >= lowest)
            page = tl.load(table + key_n // PAGE, mask=ok_n, other=0)
        else:
            ok_n = None
            page = tl.load(table + key_n // PAGE)
        # One offset for K and V, whose strides agree.
        slot = page.to(tl.int64) * stride_page + (key_n % PAGE) * stride_slot
        off_kv = slot[:, None] + (head_offset + d)[None, :]  # [BLOCK_N, BLOCK_D]
        if EDGE:
            ok = ok_n[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + off_kv, mask=ok, other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_ptr + off_kv)
        else:
            k = tl.load(k_ptr + off_kv, mask=(d < D)[None, :], other=0.0)
        k = hooked_keys(k, head, key_n, tensors, HOOKS)
        if TURNED:
            turned = query_for_tile(q, key, tensors[HOOKS.rotation_table], HOOKS, k.dtype)
            scores = tile_scores(turned, k, scale, softcap, HAS_SOFTCAP, PRECISION)
        elif HOOKS.rotated > 0:
            # Its halves are loaded apart; `k`, which nobody reads then, is not loaded.
            scores = _rotated_scores(
                q, k_ptr + slot + head_offset, ok_n, key, near_cos, near_sin, tensors, scale, softcap,
                D, EDGE, HAS_SOFTCAP, PRECISION, HOOKS,
            )  # fmt: skip
        else:
            scores = tile_scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = hooked_scores(scores, scale, b, h, q_idx, key_n, tensors, HOOKS)
        if MASKED and BY_MARK:
            # In most tiles a mask hides nothing, and it may read memory.
            if entry < MASK_HIDES_NOTHING:
                scores = hooked_mask(scores, b, h, q_idx, key_n, tensors, HOOKS)
        elif MASKED:
            scores = hooked_mask(scores, b, h, q_idx, key_n, tensors, HOOKS)
        if EDGE:
            seen = ok_n[None, :]
            if HOOKS.causal:
                seen = (key_n[None, :] <= last_key[:, None]) & seen
            if HAS_WINDOW:
                seen = seen & (key_n[None, :] > last_key[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            v = tl.load(v_ptr + off_kv, mask=ok, other=0.0)
        elif D == BLOCK_D:
            v = tl.load(v_ptr + off_kv)
        else:
            v = tl.load(v_ptr + off_kv, mask=(d < D)[None, :], other=0.0)
        if HOOKS.score_mod is not None:
            factor = TO_BASE_2
        else:
            factor = scale
        if HOOKS.sigmoid:
            row_max, row_sum, acc = sigmoid_step(scores, v, row_sum, acc, 1.0 if HAS_SOFTCAP else factor, PRECISION)
        else:
            row_max, row_sum, acc = softmax_step(scores, v, row_max, row_sum, acc, factor, HAS_SOFTCAP, PRECISION)
    return row_max, row_sum, acc


@triton.jit
def softmax_end(row_max, row_sum, acc):
    """Output `[BLOCK_M, D]` and LSE `[BLOCK_M]`, natural logarithm; 0 and -inf for a query without a visible key."""
    seen = row_sum > 0
    out = acc * tl.where(seen, 1.0 / row_sum, 0.0)[:, None]
    return out, tl.where(seen, (row_max + tl.math.log2(row_sum)) * 0.6931471805599453, float("-inf"))


@triton.jit
def attention_end(row_max, row_sum, acc, h, q_idx, tensors, HOOKS: tl.constexpr):
    """`softmax_end` with what a variant adds: sinks, another normaliser, a transform of the output."""
    row_max, row_sum, acc = hooked_sink(row_max, row_sum, acc, h, tensors, HOOKS)
    out, lse = softmax_end(row_max, row_sum, acc)
    return hooked_output(out, acc, h, q_idx, tensors, HOOKS), lse


@triton.jit
def store_output(out_ptr, lse_ptr, row, ok, out, lse, D: tl.constexpr):
    """`out: [M, BLOCK_D]` and `lse: [M]` to the rows `row: [M]` of `out_ptr: [rows, D]` and `lse_ptr: [rows]`."""
    d = tl.arange(0, out.shape[1])
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + row, lse, mask=ok)


@triton.jit
def merge_step(part_max, part_sum, part_acc, row_max, row_sum, acc):
    """The state after one more partial state, of other keys; both are `[M]`, `[M]` and `[M, BLOCK_D]`."""
    new_max = tl.maximum(row_max, part_max)
    # Without this, two empty states would give -inf - -inf = NaN.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.math.exp2(part_max - shift)
    decay = tl.math.exp2(row_max - shift)
    row_sum = row_sum * decay + part_sum * weight
    acc = acc * decay[:, None] + part_acc * weight[:, None]
    return new_max, row_sum, acc
