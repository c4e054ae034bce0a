"""The best continuations of beams, without a tensor of all their scores: in two launches of fixed shape.

Rows are split into chunks. The first launch leaves, for each, its mass and its few greatest logits; their order is that of
the scores. The second one makes scores of these: logarithms of probabilities, plus what the row has so far. The plain
PyTorch version is `continuations_reference.continuations`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.sampling.noise import best_token
from hf_fastattn.kernels.sampling.scores import CHUNK, LARGEST, Expected, check_choice, load_scores

# More of them are found faster by sorting.
MOST_KEPT = 32
# Entries of a program of the second launch.
ENTRIES = 1024


@triton.jit(do_not_specialize=["kept"])
def best_of_chunk_kernel(logits_ptr, best_ptr, token_ptr, mass_ptr, vocab, kept, stride_b, CHUNK: tl.constexpr):
    """The `kept` greatest logits of one chunk of one row of `[B, vocab]`, greatest first; `mass_ptr: [B, chunks, 2]`."""
    b = tl.program_id(1).to(tl.int64)
    cell = b * tl.num_programs(0) + tl.program_id(0)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    x = load_scores(logits_ptr + b * stride_b, token, token < vocab)
    peak = tl.maximum(tl.max(x, 0), -LARGEST)
    tl.store(mass_ptr + 2 * cell, peak)
    tl.store(mass_ptr + 2 * cell + 1, tl.sum(tl.exp(x - peak), 0))
    for place in range(0, kept):
        top, winner = best_token(x, token)
        tl.store(best_ptr + cell * kept + place, top)
        tl.store(token_ptr + cell * kept + place, winner.to(tl.int64))
        x = tl.where(token == winner, float("-inf"), x)


@triton.jit(do_not_specialize=["entries", "chunks"])
def score_kernel(best_ptr, mass_ptr, so_far_ptr, entries, chunks, BLOCK_C: tl.constexpr, ENTRIES: tl.constexpr):
    """Logits of one row become scores, in place."""
    b = tl.program_id(1).to(tl.int64)
    chunk = tl.arange(0, BLOCK_C)
    mass_ptr += 2 * (b * chunks + chunk)
    ok = chunk < chunks
    peaks = tl.load(mass_ptr, mask=ok, other=-LARGEST)
    peak = tl.max(peaks, 0)
    total = tl.sum(tl.load(mass_ptr + 1, mask=ok, other=0.0) * tl.exp(peaks - peak), 0)
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < entries
    best_ptr += b * entries + entry
    scores = tl.load(best_ptr, mask=there, other=0.0) - peak - tl.log(total) + tl.load(so_far_ptr + b)
    tl.store(best_ptr, scores, mask=there)


def continuations(logits: Tensor, so_far: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Scores `[B, C]` and tokens `[B, C]` int64 among which are those of the `kept` best tokens of every row.

    A score is the logarithm of the token's probability plus `so_far` of its row. NaN counts as -inf.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, any stride between rows.
        so_far: `[B]` fp32.
        kept: at most MOST_KEPT.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    rows, vocab = logits.shape if logits.ndim == 2 else (0, 0)
    if not 0 < kept <= min(MOST_KEPT, vocab):
        raise ValueError(f"kept={kept} must be from 1 to {MOST_KEPT}, and no more than the {vocab} tokens")
    chunks = triton.cdiv(vocab, CHUNK)
    tokens = torch.empty((rows, chunks * kept), dtype=torch.int64, device=logits.device)
    inputs: dict[str, Expected] = {"so_far": (so_far, (rows,), (torch.float32,))}
    check_choice(logits, tokens[:, 0], inputs)
    best = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    mass = torch.empty((rows, chunks, 2), dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        prepared(best_of_chunk_kernel)[(chunks, rows)](
            logits, best, tokens, mass, vocab, kept, logits.stride(0), CHUNK=CHUNK, num_warps=8
        )
        prepared(score_kernel)[(triton.cdiv(chunks * kept, ENTRIES), rows)](
            best, mass, so_far, chunks * kept, chunks, BLOCK_C=power_of_2(chunks), ENTRIES=ENTRIES, num_warps=4
        )
    return best, tokens
