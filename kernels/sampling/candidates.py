"""The few scores that top-k and top-p choose among, gathered before they are looked at.

The first launch left the largest logit of every vocabulary group (GROUP neighbouring tokens). If `rank` groups reach a
score, so do at least `rank` tokens: the rank-th largest of these maxima is a lower bound of the rank-th largest logit, and
only groups that reach it can hold one of the first `rank` tokens. Whether enough was gathered is checked afterwards; a flat
distribution fails the check, and its whole row is searched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.sampling.noise import best_token, token_noise
from hf_fastattn.kernels.sampling.scores import LARGEST, LOG2E, load_scores
from hf_fastattn.kernels.sampling.threshold import key_score, masses, order_key, search_block


@triton.jit
def gather_candidates(
    row_ptr, maxima_ptr, hot_ptr, score_ptr, token_ptr, vocab, groups, inverse, top_k, filters_mass, floor,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, MOST_RANK: tl.constexpr, SLOTS: tl.constexpr, TILE_G: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """Write scores and tokens above a bound to `score_ptr` and `token_ptr`, both `[SLOTS]`.

    `filters_mass`: top-k or top-p is on. If neither, the bound is `floor`, the scaled score of min-p.

    Returns:
        How many reach the bound; this may be more than SLOTS, of which only SLOTS are written.
    """
    group = tl.arange(0, BLOCK_G)
    ok = group < groups
    maxima = tl.load(maxima_ptr + group, mask=ok, other=float("-inf"))  # [BLOCK_G]
    bound = floor
    if filters_mass:
        rank = tl.where((top_k > 0) & (top_k <= groups), top_k, tl.maximum(tl.minimum(groups // 2, MOST_RANK), 1))
        keys = order_key(maxima, SHIFT)
        low = tl.min(tl.where(ok, keys, 0x7FFFFFFF), 0)
        low = search_block(keys, ok.to(tl.float32), low, tl.max(keys, 0) + 1, rank)
        bound = key_score(low, SHIFT) * inverse
    hot = (ok & (maxima * inverse >= bound)).to(tl.int32)
    tl.store(hot_ptr + tl.cumsum(hot, 0) - 1, group, mask=hot != 0)
    hot_groups = tl.sum(hot, 0)
    tl.debug_barrier()
    count = tl.sum(tl.zeros([TILE_G], tl.int32), 0)
    for begin in range(0, hot_groups, TILE_G):
        number = begin + tl.arange(0, TILE_G)  # [TILE_G]
        ok_group = number < hot_groups
        first = tl.load(hot_ptr + number, mask=ok_group, other=0) * GROUP
        token = first[:, None] + tl.arange(0, GROUP)[None, :]  # [TILE_G, GROUP]
        ok_token = ok_group[:, None] & (token < vocab)
        x = load_scores(row_ptr, token, ok_token)
        chosen = (ok_token & (x * inverse >= bound)).to(tl.int32)  # [TILE_G, GROUP], as `slot`
        counts = tl.sum(chosen, 1)
        slot = count + (tl.cumsum(counts, 0) - counts)[:, None] + tl.cumsum(chosen, 1) - 1
        kept = (chosen != 0) & (slot < SLOTS)
        tl.store(score_ptr + slot, x, mask=kept)
        tl.store(token_ptr + slot, token, mask=kept)
        count += tl.sum(counts, 0)
    tl.debug_barrier()
    return count


@triton.jit
def draw_candidate(
    score_ptr, token_ptr, count, inverse, peak, total, top_k, top_p, floor, seed, row, step,
    SLOTS: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Draw a token from the candidates.

    `peak` is the largest logit, `total` the mass of the row, of which top-p keeps a share if top-k is off.

    Returns:
        The token, the least scaled score kept, and whether the candidates hold all tokens that are kept.
    """
    slot = tl.arange(0, SLOTS)  # [SLOTS], as all below
    ok = slot < count
    x = tl.load(score_ptr + slot, mask=ok, other=float("-inf"))
    token = tl.load(token_ptr + slot, mask=ok, other=0)
    z = x * inverse
    keys = order_key(x, SHIFT)
    low = tl.min(tl.where(ok, keys, 0x7FFFFFFF), 0)
    high = order_key(peak, SHIFT) + 1
    least = tl.full([], float("-inf"), tl.float32)
    if top_k > 0:
        low = search_block(keys, ok.to(tl.float32), low, high, top_k)
        least = key_score(low, SHIFT) * inverse
    enough = top_p >= 1.0
    if top_p < 1.0:
        weights = masses(x, z, least, tl.maximum(peak, -LARGEST), inverse * LOG2E)
        held = tl.sum(weights, 0)
        need = top_p * tl.where(top_k > 0, held, total)
        enough = held >= need
        low = search_block(keys, weights, low, high, need)
        least = tl.maximum(least, key_score(low, SHIFT) * inverse)
    least = tl.maximum(least, floor)
    score = z + token_noise(seed, row, step, token, CHUNK)
    score = tl.where(ok & (z >= least), score, float("-inf"))
    _, winner = best_token(score, tl.where(ok, token, 0x7FFFFFFF))
    return winner, least, enough
