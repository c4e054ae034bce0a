"""Gumbel noise of a token, from its number, its row and the step only: the same in any batch and launch.

The generator is Philox (Salmon et al., 2011) with the seed as key. One counter gives four numbers. They belong to the four
quarters of a chunk of tokens, so a program over a whole chunk uses all four, and reads contiguous scores.
The token with the greatest `score + noise` is a draw from the softmax of the scores (Gumbel, 1954).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_fastattn.kernels.sampling.scores import load_scores


@triton.jit
def gumbel(bits):
    """32 random bits to `-log(-log(1 - u))`, finite, and most precise for small u, which give the greatest noise."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = u * (1.0 + u * (0.5 + u * (0.33333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.05, series, -tl.log(1.0 - u)))


@triton.jit
def random_bits(seed, row, step, counter):
    """Four blocks of 32 bits, of the shape of `counter` (int32); row int32, seed and step int64."""
    zero = counter * 0
    low = (step & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    return tl.philox(seed, counter, zero + row, zero + low, zero + (step >> 32).to(tl.int32))


@triton.jit
def token_noise(seed, row, step, token, CHUNK: tl.constexpr):
    """The noise of tokens (int32), which need not be neighbours."""
    QUARTER: tl.constexpr = CHUNK // 4
    quarter = token % CHUNK // QUARTER
    b0, b1, b2, b3 = random_bits(seed, row, step, token // CHUNK * QUARTER + token % QUARTER)
    return gumbel(tl.where(quarter < 2, tl.where(quarter == 0, b0, b1), tl.where(quarter == 2, b2, b3)))


@triton.jit
def _draw_quarter(row_ptr, vocab, inverse, least, token, bits, best, winner):
    """`best` and `winner` after a quarter of a chunk; all blocks are `[CHUNK // 4]`."""
    ok = token < vocab
    z = load_scores(row_ptr, token, ok) * inverse
    score = tl.where(ok & (z >= least), z + gumbel(bits), float("-inf"))
    better = score > best
    return tl.where(better, score, best), tl.where(better, token, winner)


@triton.jit
def draw_chunk(row_ptr, vocab, inverse, least, seed, row, step, begin, best, winner, CHUNK: tl.constexpr):
    """Noisy scores of the tokens from `begin` on whose scaled score is at least `least`.

    `best: [CHUNK // 4]` holds the greatest noisy score so far in each lane, `winner` its token; both are returned updated.
    """
    QUARTER: tl.constexpr = CHUNK // 4
    lane = tl.arange(0, QUARTER)  # [CHUNK // 4], as all below
    b0, b1, b2, b3 = random_bits(seed, row, step, begin // 4 + lane)
    token = begin + lane
    best, winner = _draw_quarter(row_ptr, vocab, inverse, least, token, b0, best, winner)
    best, winner = _draw_quarter(row_ptr, vocab, inverse, least, token + QUARTER, b1, best, winner)
    best, winner = _draw_quarter(row_ptr, vocab, inverse, least, token + 2 * QUARTER, b2, best, winner)
    return _draw_quarter(row_ptr, vocab, inverse, least, token + 3 * QUARTER, b3, best, winner)


@triton.jit
def best_token(best, winner):
    """The greatest of a block of scores, and the lowest token that has it."""
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, winner, 0x7FFFFFFF), 0)
