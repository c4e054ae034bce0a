"""`attend_tiles` of `tile.py` for pages of 16 and 32 bits, and the same loop for pages of 8 bits.

What is different with 8 bits stands in `eight_bits.py`. For few packed query rows, where reading keys takes the time, values
are read in words of four: each word gives one column to each of four products, so that no byte is moved to another thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.attention.eight_bits import (
    add_scaled,
    columns_by_four,
    columns_together,
    key_and_value_scales,
    relative_weights,
    widened,
    widened_query,
    widened_words,
)
from hf_fastattn.kernels.attention.hooked import LOG2E as TO_BASE_2
from hf_fastattn.kernels.attention.hooked import hooked_keys, hooked_mask, hooked_scores, sigmoid_weights
from hf_fastattn.kernels.attention.tile import attend_tiles as attend_wide_tiles
from hf_fastattn.kernels.attention.tile import softmax_weights, tile_scores
from hf_fastattn.kernels.attention.visited import MASK_HIDES_NOTHING, number_of

# Up to so many packed query rows the matrix unit takes both factors from registers, and for heads of at least so many
# dimensions each of the four products has the 16 columns that it needs.
WORD_ROWS, WORD_DIM = tl.constexpr(32), tl.constexpr(64)


@triton.jit
def attend_tiles(
    q, row_max, row_sum, acc, lo, hi, k_ptr, v_ptr, table, head_offset, last_key, lowest, length, window, scale, softcap,
    stride_page, stride_slot, b, head, h, q_idx, tensors,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EDGE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
    listed=None, MASKED: tl.constexpr = True, BY_MARK: tl.constexpr = False, WHOLE_TILES: tl.constexpr = True,
):  # fmt: skip
    """See `tile.attend_tiles`. WHOLE_TILES: of 8 bits, tiles that no mask cuts have a loop of their own."""
    if k_ptr.dtype.element_ty.primitive_bitwidth == 8:
        masked_from = lo
        if WHOLE_TILES and EDGE and listed is None and not HAS_WINDOW and q.shape[0] <= WORD_ROWS:
            # Masks are a quarter of the instructions of a tile, which count where half as many bytes are read.
            seen = length
            if HOOKS.causal:
                seen = tl.minimum(tl.min(last_key, 0) + 1, length)
            masked_from = lo + tl.maximum(tl.minimum(seen, hi) - lo, 0) // BLOCK_N * BLOCK_N
            masked_from = tl.where(lo >= lowest, masked_from, lo)
            row_max, row_sum, acc = _attend_eight_bits(
                q, row_max, row_sum, acc, lo, masked_from, k_ptr, v_ptr, table, head_offset, last_key, lowest, length,
                window, scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
                D, BLOCK_D, PAGE, BLOCK_N, STAGES, False, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HOOKS, listed, MASKED, BY_MARK,
            )  # fmt: skip
        row_max, row_sum, acc = _attend_eight_bits(
            q, row_max, row_sum, acc, masked_from, hi, k_ptr, v_ptr, table, head_offset, last_key, lowest, length, window,
            scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
            D, BLOCK_D, PAGE, BLOCK_N, STAGES, EDGE, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HOOKS, listed, MASKED, BY_MARK,
        )  # fmt: skip
    else:
        row_max, row_sum, acc = attend_wide_tiles(
            q, row_max, row_sum, acc, lo, hi, k_ptr, v_ptr, table, head_offset, last_key, lowest, length, window, scale,
            softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
            D, BLOCK_D, PAGE, BLOCK_N, STAGES, EDGE, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HOOKS, listed, MASKED, BY_MARK,
        )  # fmt: skip
    return row_max, row_sum, acc


@triton.jit
def _attend_eight_bits(
    q, row_max, row_sum, acc, lo, hi, k_ptr, v_ptr, table, head_offset, last_key, lowest, length, window, scale, softcap,
    stride_page, stride_slot, b, head, h, q_idx, tensors,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EDGE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
    listed, MASKED: tl.constexpr, BY_MARK: tl.constexpr,
):  # fmt: skip
    INTEGERS: tl.constexpr = k_ptr.dtype.element_ty == tl.int8
    dtype: tl.constexpr = q.dtype
    WORDS: tl.constexpr = q.shape[0] <= WORD_ROWS and BLOCK_D >= WORD_DIM and q.dtype != tl.float32 and D % 4 == 0
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    # What undoes the factor on queries is one with that of the softmax, if nothing comes between.
    FOLDED: tl.constexpr = HOOKS.key_transform is None and HOOKS.score_mod is None and not HAS_SOFTCAP
    if HOOKS.score_mod is not None:
        factor = tl.full([q.shape[0]], TO_BASE_2, tl.float32)
    elif HAS_SOFTCAP:
        factor = tl.full([q.shape[0]], 1.0, tl.float32)
    else:
        factor = tl.zeros([q.shape[0]], tl.float32) + scale
    if HOOKS.key_transform is None:
        q, undo = widened_query(q)
        if FOLDED:
            factor = factor * undo
    if WORDS:
        acc_0, acc_1, acc_2, acc_3 = columns_by_four(acc)
        word = tl.arange(0, BLOCK_D // 4)
        word_ptr = v_ptr.to(tl.pointer_type(tl.int32))
    for at in tl.range(lo, hi, BLOCK_N if listed is None else 1, num_stages=STAGES):
        key = at
        if listed is not None:
            entry = tl.load(listed + at)
            key = number_of(entry) * BLOCK_N
        key_n = key + n  # [BLOCK_N]
        if EDGE:
            ok_n = (key_n < length) & (key_n >= lowest)
            page = tl.load(table + key_n // PAGE, mask=ok_n, other=0)
            key_scales, value_scales = key_and_value_scales(k_ptr, page, key_n, head, ok_n, stride_page, stride_slot, PAGE)
        else:
            page = tl.load(table + key_n // PAGE)
            key_scales, value_scales = key_and_value_scales(k_ptr, page, key_n, head, None, stride_page, stride_slot, PAGE)
        slot = page.to(tl.int64) * stride_page + (key_n % PAGE) * stride_slot + head_offset
        off_kv = slot[:, None] + d[None, :]  # [BLOCK_N, BLOCK_D]
        if EDGE:
            ok = ok_n[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + off_kv, mask=ok, other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_ptr + off_kv)
        else:
            k = tl.load(k_ptr + off_kv, mask=(d < D)[None, :], other=0.0)
        if HOOKS.key_transform is None:
            if FOLDED:
                factors = key_scales[None, :]
            else:
                factors = undo[:, None] * key_scales[None, :]
            scores = tile_scores(q, widened(k, dtype), scale, softcap, HAS_SOFTCAP, PRECISION, factors)
        else:
            # A transform takes keys as they were.
            wide = (widened(k, tl.float32) * key_scales[:, None]).to(q.dtype)
            wide = hooked_keys(wide, head, key_n, tensors, HOOKS)
            scores = tile_scores(q, wide, scale, softcap, HAS_SOFTCAP, PRECISION)
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
        if HOOKS.sigmoid:
            weights = sigmoid_weights(scores, factor[:, None])
            decay = tl.full([q.shape[0]], 1.0, tl.float32)
            row_max = tl.zeros_like(row_sum)
        else:
            row_max, decay, weights = softmax_weights(scores, row_max, factor, factor[:, None])
        row_sum = row_sum * decay + tl.sum(weights, 1)
        if WORDS:
            off_word = (slot >> 2)[:, None] + word[None, :]
            if EDGE:
                words = tl.load(word_ptr + off_word, mask=ok_n[:, None] & (word < D // 4)[None, :], other=0)
            elif D == BLOCK_D:
                words = tl.load(word_ptr + off_word)
            else:
                words = tl.load(word_ptr + off_word, mask=(word < D // 4)[None, :], other=0)
            v_0, v_1, v_2, v_3 = widened_words(words, INTEGERS)
            relative, largest = relative_weights(weights, value_scales)
            acc_0 = acc_0 * decay[:, None] + tl.dot(relative, v_0) * largest
            acc_1 = acc_1 * decay[:, None] + tl.dot(relative, v_1) * largest
            acc_2 = acc_2 * decay[:, None] + tl.dot(relative, v_2) * largest
            acc_3 = acc_3 * decay[:, None] + tl.dot(relative, v_3) * largest
        else:
            if EDGE:
                v = tl.load(v_ptr + off_kv, mask=ok, other=0.0)
            elif D == BLOCK_D:
                v = tl.load(v_ptr + off_kv)
            else:
                v = tl.load(v_ptr + off_kv, mask=(d < D)[None, :], other=0.0)
            acc = add_scaled(weights, widened(v, dtype), value_scales, acc * decay[:, None], PRECISION)
    if WORDS:
        acc = columns_together(acc_0, acc_1, acc_2, acc_3)
    return row_max, row_sum, acc
