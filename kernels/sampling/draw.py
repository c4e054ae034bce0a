"""A token drawn for every row, in two launches of fixed shape: for decode steps in a CUDA graph.

The first launch splits every row into chunks. Without a filter it leaves for each chunk the token with the greatest
logit / temperature + Gumbel noise; with filters it leaves the largest logit of every vocabulary group (GROUP neighbouring
tokens), and the mass of the chunk. The second launch, one program a row, takes the best of the chunks, or gathers the
candidates (`candidates.py`), finds the least score that top-k, top-p and min-p keep (`threshold.py`) and
draws among the scores that reach it. Parameters that differ from call to call are read from device memory. A draw depends
on the scores, the parameters, seed, row number and step, not on the rest of the batch. The plain PyTorch version is in
`reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import arch_of, hash_callees, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.sampling.candidates import draw_candidate, gather_candidates
from hf_fastattn.kernels.sampling.greedy import best_of_chunks, greedy_tokens
from hf_fastattn.kernels.sampling.noise import best_token, draw_chunk
from hf_fastattn.kernels.sampling.params import PARAMS
from hf_fastattn.kernels.sampling.scores import (
    CHUNK,
    LARGEST,
    LOG2E,
    Expected,
    check_choice,
    filter_params,
    inverse_temperature,
    load_scores,
)
from hf_fastattn.kernels.sampling.threshold import masses, row_threshold

# Tokens of a vocabulary group, of which the largest logit is kept.
GROUP = 128
# Most groups to look into without top-k; most candidates; groups gathered at a time.
MOST_RANK, SLOTS, TILE_G = 512, 4096, 32
# Tokens of one step over a whole row; a quarter of them if rows are not aligned for vector loads, to save registers.
TILE = 16_384
# Low bits of a logit, widened to fp32, that are always zero.
SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _write_group_maxima(row_ptr, out_ptr, vocab, begin, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Write the largest logit of every group of a chunk; returns the largest of the chunk."""
    peak = tl.full([], float("-inf"), tl.float32)
    ROWS: tl.constexpr = CHUNK // GROUP // 4
    for quarter in tl.static_range(4):
        group = begin // GROUP + quarter * ROWS + tl.arange(0, ROWS)  # [ROWS]
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [ROWS, GROUP]
        maxima = tl.max(load_scores(row_ptr, token, token < vocab), 1)
        tl.store(out_ptr + group, maxima, mask=group * GROUP < vocab)
        peak = tl.maximum(peak, tl.max(maxima, 0))
    return peak


@triton.jit(do_not_specialize=["groups"])
def scan_logits_kernel(
    logits_ptr, maxima_ptr, mass_ptr, best_ptr, winner_ptr, params_ptr, seed_ptr, rows_ptr, step_ptr,
    vocab, groups, stride_b, CHUNK: tl.constexpr, GROUP: tl.constexpr, OWN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of one row of `[B, vocab]`. `mass_ptr: [B, chunks, 2]` gets the peak and the mass relative to it.

    A row has OWN parameters of its own; of 0, all rows share them.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    begin = tl.program_id(0) * CHUNK
    b = tl.program_id(1).to(tl.int64)
    cell = b * tl.num_programs(0) + tl.program_id(0)
    row_ptr = logits_ptr + b * stride_b
    params_ptr += b * OWN
    inverse = inverse_temperature(params_ptr)
    top_k, top_p, _, filtered = filter_params(params_ptr, vocab)
    if filtered:
        peak = _write_group_maxima(row_ptr, maxima_ptr + b * groups, vocab, begin, GROUP, CHUNK)
        if (top_k == 0) & (top_p < 1.0):
            token = begin + tl.arange(0, CHUNK)  # [CHUNK]
            x = load_scores(row_ptr, token, token < vocab)
            peak = tl.maximum(peak, -LARGEST)
            mass = masses(x, x * inverse, float("-inf"), peak, inverse * LOG2E)
            tl.store(mass_ptr + cell * 2, peak)
            tl.store(mass_ptr + cell * 2 + 1, tl.sum(mass, 0))
    else:
        best = tl.full([CHUNK // 4], float("-inf"), tl.float32)
        winners = begin + tl.arange(0, CHUNK // 4)
        seed, row, step = tl.load(seed_ptr), tl.load(rows_ptr + b), tl.load(step_ptr).to(tl.int64)
        least = float("-inf")
        best, winners = draw_chunk(row_ptr, vocab, inverse, least, seed, row, step, begin, best, winners, CHUNK)
        top, winner = best_token(best, winners)
        tl.store(best_ptr + cell, top)
        tl.store(winner_ptr + cell, winner)


@triton.jit
def _row_mass(mass_ptr, cell, chunks, peak, scale, BLOCK_C: tl.constexpr):
    """The mass of a row relative to its peak, from the masses of its chunks."""
    chunk = tl.arange(0, BLOCK_C)  # [BLOCK_C], as all below
    ok = chunk < chunks
    peaks = tl.load(mass_ptr + (cell + chunk) * 2, mask=ok, other=-LARGEST)
    mass = tl.load(mass_ptr + (cell + chunk) * 2 + 1, mask=ok, other=0.0)
    return tl.sum(mass * tl.exp2((peaks - tl.maximum(peak, -LARGEST)) * scale), 0)


@triton.jit(do_not_specialize=["groups", "chunks"])
def draw_kernel(
    logits_ptr, maxima_ptr, mass_ptr, best_ptr, winner_ptr, hot_ptr, candidate_ptr, candidate_token_ptr,
    params_ptr, seed_ptr, rows_ptr, step_ptr, out_ptr, threshold_ptr, vocab, groups, chunks, stride_b, stride_out,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, MOST_RANK: tl.constexpr, SLOTS: tl.constexpr, TILE_G: tl.constexpr,
    TILE: tl.constexpr, SHIFT: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, OWN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: without filters from the best of its chunks, else from the candidates, or from the whole row if need be."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    params_ptr += b * OWN
    inverse = inverse_temperature(params_ptr)
    top_k, top_p, min_p, filtered = filter_params(params_ptr, vocab)
    least = tl.full([], float("-inf"), tl.float32)
    if filtered:
        seed, row, step = tl.load(seed_ptr), tl.load(rows_ptr + b), tl.load(step_ptr).to(tl.int64)
        row_ptr = logits_ptr + b * stride_b
        group = tl.arange(0, BLOCK_G)
        maxima = tl.load(maxima_ptr + b * groups + group, mask=group < groups, other=float("-inf"))  # [BLOCK_G]
        peak = tl.max(maxima, 0)
        floor = least
        if min_p > 0.0:
            floor = peak * inverse + tl.minimum(tl.log(min_p), 0.0)
        count = gather_candidates(
            row_ptr, maxima_ptr + b * groups, hot_ptr + b * groups, candidate_ptr + b * SLOTS,
            candidate_token_ptr + b * SLOTS, vocab, groups, inverse, top_k, (top_k > 0) | (top_p < 1.0), floor,
            GROUP, BLOCK_G, MOST_RANK, SLOTS, TILE_G, SHIFT,
        )  # fmt: skip
        winner = tl.full([], 0, tl.int32)
        enough = (count <= SLOTS) & (count >= top_k)
        if enough:
            total = tl.full([], 0.0, tl.float32)
            if (top_k == 0) & (top_p < 1.0):
                total = _row_mass(mass_ptr, b * chunks, chunks, peak, inverse * LOG2E, BLOCK_C)
            winner, least, enough = draw_candidate(
                candidate_ptr + b * SLOTS, candidate_token_ptr + b * SLOTS, count, inverse, peak, total,
                top_k, top_p, floor, seed, row, step, SLOTS, CHUNK, SHIFT,
            )  # fmt: skip
        if enough == 0:
            least = tl.maximum(row_threshold(row_ptr, vocab, inverse, peak, top_k, top_p, SHIFT, TILE), floor)
            best = tl.full([CHUNK // 4], float("-inf"), tl.float32)
            winners = tl.arange(0, CHUNK // 4)
            for begin in range(0, vocab, CHUNK):
                best, winners = draw_chunk(
                    row_ptr, vocab, inverse, least, seed, row, step, begin, best, winners, CHUNK
                )  # fmt: skip
            _, winner = best_token(best, winners)
    else:
        winner = best_of_chunks(best_ptr, winner_ptr, b * chunks, chunks, BLOCK_C)
    tl.store(out_ptr + b * stride_out, winner.to(tl.int64))
    if threshold_ptr is not None:
        tl.store(threshold_ptr + b, least)


# They share functions with the kernels of greedy choice.
hash_callees(scan_logits_kernel, draw_kernel)


def sample_tokens(
    logits: Tensor,
    out_tokens: Tensor,
    params: Tensor,
    seed: Tensor,
    rows: Tensor,
    step: Tensor,
    *,
    thresholds: Tensor | None = None,
) -> None:
    """A token of every row, drawn as Transformers' warpers leave the scores: temperature, top-k, top-p, min-p.

    Tokens that tie with the last one kept are kept too. NaN counts as -inf. A row without a finite logit still gives a token
    of its greatest score.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, any stride between rows; penalties applied (`process_logits`).
        out_tokens: `[B]` int64, written; any stride.
        params: `[PARAMS]` fp32, of `SamplingParams`; or `[B, PARAMS]`, each row's own.
        seed: `[1]` int64.
        rows: `[B]` int32, the number of each row, on which its random numbers depend.
        step: `[1]` int32 or int64, on which they depend too.
        thresholds: `[B]` fp32, gets the least logit / temperature kept (-inf if all is).

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    count, vocab = logits.shape if logits.ndim == 2 else (0, 0)
    inputs: dict[str, Expected] = {
        "params": (params, (count, PARAMS) if params.ndim == 2 else (PARAMS,), (torch.float32,)),
        "seed": (seed, (1,), (torch.int64,)),
        "rows": (rows, (count,), (torch.int32,)),
        "step": (step, (1,), (torch.int32, torch.int64)),
    }
    if thresholds is not None:
        inputs["thresholds"] = (thresholds, (count,), (torch.float32,))
    check_choice(logits, out_tokens, inputs)
    if not count:
        return
    chunks, groups = triton.cdiv(vocab, CHUNK), triton.cdiv(vocab, GROUP)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((count, *shape), dtype=dtype, device=logits.device)

    maxima, hot = scratch(groups), scratch(groups, dtype=torch.int32)
    mass, best, winner = scratch(chunks, 2), scratch(chunks), scratch(chunks, dtype=torch.int32)
    candidates, candidate_tokens = scratch(SLOTS), scratch(SLOTS, dtype=torch.int32)
    aligned = vocab % 16 == 0 and logits.stride(0) % 16 == 0
    overlap, own = overlaps_launches(arch_of(logits.device)), PARAMS if params.ndim == 2 else 0
    options = {"launch_pdl": True} if overlap else {}
    with on_device_of(logits):
        prepared(scan_logits_kernel)[(chunks, count)](
            logits, maxima, mass, best, winner, params, seed, rows, step, vocab, groups, logits.stride(0),
            CHUNK=CHUNK, GROUP=GROUP, OWN=own, OVERLAP=overlap, num_warps=4, **options,
        )  # fmt: skip
        prepared(draw_kernel)[(count,)](
            logits, maxima, mass, best, winner, hot, candidates, candidate_tokens, params, seed, rows, step,
            out_tokens, thresholds, vocab, groups, chunks, logits.stride(0), out_tokens.stride(0),
            CHUNK=CHUNK, GROUP=GROUP, MOST_RANK=MOST_RANK, SLOTS=SLOTS, TILE_G=TILE_G,
            TILE=TILE if aligned else TILE // 4, SHIFT=SHIFTS[logits.dtype], BLOCK_G=power_of_2(groups),
            BLOCK_C=power_of_2(chunks), OWN=own, OVERLAP=overlap, num_warps=16, **options,
        )  # fmt: skip


def choose_tokens(
    logits: Tensor,
    out_tokens: Tensor,
    *,
    params: Tensor | None = None,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    step: Tensor | None = None,
    thresholds: Tensor | None = None,
) -> None:
    """`sample_tokens` with `params`, `greedy_tokens` without.

    Raises:
        ValueError: as these two, or of the four some are given and others are not.
    """
    if params is None and seed is None and rows is None and step is None:
        greedy_tokens(logits, out_tokens)
    elif params is None or seed is None or rows is None or step is None:
        raise ValueError("params, seed, rows and step must be given together, or none of them for the greatest logit")
    else:
        sample_tokens(logits, out_tokens, params, seed, rows, step, thresholds=thresholds)
