"""The token of greatest logit of every row, in two launches of fixed shape.

Rows are split into chunks, a program each; a second launch takes the best of them. The plain PyTorch version is
`reference.greedy_tokens`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.sampling.noise import best_token
from hf_fastattn.kernels.sampling.scores import CHUNK, check_choice, load_scores


@triton.jit
def best_of_chunks(best_ptr, winner_ptr, cell, chunks, BLOCK_C: tl.constexpr):
    """The token of greatest score among the best of the chunks from `cell` on."""
    chunk = tl.arange(0, BLOCK_C)  # [BLOCK_C], as all below
    ok = chunk < chunks
    best = tl.load(best_ptr + cell + chunk, mask=ok, other=float("-inf"))
    _, token = best_token(best, tl.load(winner_ptr + cell + chunk, mask=ok, other=0x7FFFFFFF))
    return token


@triton.jit
def greedy_chunk_kernel(
    logits_ptr, best_ptr, winner_ptr, vocab, stride_b, CHUNK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """The best token of one chunk of one row of `[B, vocab]`."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(1).to(tl.int64)
    cell = b * tl.num_programs(0) + tl.program_id(0)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    top, winner = best_token(load_scores(logits_ptr + b * stride_b, token, token < vocab), token)
    tl.store(best_ptr + cell, top)
    tl.store(winner_ptr + cell, winner)


@triton.jit(do_not_specialize=["chunks"])
def best_of_chunks_kernel(
    best_ptr, winner_ptr, out_ptr, chunks, stride_out, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """The token of one row from the best of its chunks."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    tl.store(out_ptr + b * stride_out, best_of_chunks(best_ptr, winner_ptr, b * chunks, chunks, BLOCK_C).to(tl.int64))


def greedy_tokens(logits: Tensor, out_tokens: Tensor) -> None:
    """The token of greatest logit of every row, the lowest of several; NaN counts as -inf.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, any stride between rows.
        out_tokens: `[B]` int64, written; any stride.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_choice(logits, out_tokens, {})
    rows, vocab = logits.shape
    if not rows:
        return
    chunks = triton.cdiv(vocab, CHUNK)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    winner = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    overlap = overlaps_launches(arch_of(logits.device))
    options = {"launch_pdl": True} if overlap else {}
    with on_device_of(logits):
        prepared(greedy_chunk_kernel)[(chunks, rows)](
            logits, best, winner, vocab, logits.stride(0), CHUNK=CHUNK, OVERLAP=overlap, num_warps=4, **options
        )
        prepared(best_of_chunks_kernel)[(rows,)](
            best, winner, out_tokens, chunks, out_tokens.stride(0),
            BLOCK_C=power_of_2(chunks), OVERLAP=overlap, num_warps=1, **options,
        )  # fmt: skip
