"""The logarithm of the probability that a token is chosen with, for every row, in one launch of fixed shape.

The distribution is the softmax of logit / temperature over the scores that a draw has kept, which is what `sample_tokens`
draws from and says by its thresholds; or, without parameters, of the logits. The plain PyTorch version is
`reference.token_logprobs`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.sampling.params import PARAMS
from hf_fastattn.kernels.sampling.scores import (
    LARGEST,
    LOG2E,
    Expected,
    check_choice,
    inverse_temperature,
    load_scores,
)

# Tokens of one step over a row.
TILE = 8192


@triton.jit
def token_logprobs_kernel(
    logits_ptr, tokens_ptr, params_ptr, least_ptr, out_ptr, vocab, stride_b, stride_token,
    OWN: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of `[B, vocab]`: its greatest score and the mass relative to it, and then the score of the token."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + b * stride_b
    inverse = tl.full([], 1.0, tl.float32)
    least = tl.full([], float("-inf"), tl.float32)
    if params_ptr is not None:
        inverse = inverse_temperature(params_ptr + b * OWN)
        least = tl.load(least_ptr + b)
    peak = tl.full([], 0.0, tl.float32) - LARGEST
    total = tl.full([], 0.0, tl.float32)
    for begin in range(0, vocab, TILE):
        token = begin + tl.arange(0, TILE)  # [TILE]
        z = load_scores(row_ptr, token, token < vocab) * inverse
        z = tl.where(z >= least, z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        total = total * tl.exp2((peak - higher) * LOG2E) + tl.sum(tl.exp2((z - higher) * LOG2E), 0)
        peak = higher
    chosen = load_scores(row_ptr, tl.load(tokens_ptr + b * stride_token), True) * inverse
    tl.store(out_ptr + b, chosen - peak - tl.log(total))


def token_logprobs(
    logits: Tensor, tokens: Tensor, out: Tensor, *, params: Tensor | None = None, thresholds: Tensor | None = None
) -> None:
    """Logarithms of the probabilities that tokens were chosen with. NaN counts as -inf.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, any stride between rows, as they were drawn from.
        tokens: `[B]` int64, those that were chosen; any stride.
        out: `[B]` fp32, written.
        params: `[PARAMS]` fp32, or `[B, PARAMS]`: of the draw; None for the softmax of the logits.
        thresholds: `[B]` fp32 that `sample_tokens` has written; given if `params` are.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel, or only one of `params` and `thresholds`
            is given.
    """
    if (params is None) != (thresholds is None):
        raise ValueError("params and thresholds must be given together, or neither for the softmax of the logits")
    count, vocab = logits.shape if logits.ndim == 2 else (0, 0)
    inputs: dict[str, Expected] = {"out": (out, (count,), (torch.float32,))}
    if params is not None and thresholds is not None:
        inputs["params"] = (params, (count, PARAMS) if params.ndim == 2 else (PARAMS,), (torch.float32,))
        inputs["thresholds"] = (thresholds, (count,), (torch.float32,))
    check_choice(logits, tokens, inputs)
    if not count:
        return
    overlap = overlaps_launches(arch_of(logits.device))
    with on_device_of(logits):
        prepared(token_logprobs_kernel)[(count,)](
            logits, tokens, params, thresholds, out, vocab, logits.stride(0), tokens.stride(0),
            OWN=PARAMS if params is not None and params.ndim == 2 else 0, TILE=TILE, OVERLAP=overlap, num_warps=8,
            **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
