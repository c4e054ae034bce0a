"""The router of a mixture of experts: logits, softmax or sigmoid, the K best experts, their weights.

Few tokens take one launch: a program multiplies all of them with one row of the weight, and the last program to arrive
chooses for all of them, and lists the experts that any of them chose. For more tokens cuBLAS multiplies, and a second
launch chooses and counts the tokens of each expert. Logits are summed in fp32 and rounded to the dtype of x, as a linear
layer rounds them, so ties are as common as in Transformers; of experts with equal scores the lowest index is chosen, which
`torch.topk` does not promise. The plain PyTorch version is `reference.route`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.experts.choice import choose
from hf_fastattn.kernels.experts.configs import FEW_TOKENS
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.launch import DTYPES, arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.layer.split_sums import SplitSums
from hf_fastattn.kernels.rehearsal import prepared

MOST_EXPERTS = 1024
# Elements of x that a program multiplies at once, over all tokens.
ELEMENTS = 4096
MOST_COLUMNS = 2048
# Scores that a program of the second launch compares at once.
SCORES = 1024
# Above so many scores of all tokens a program of the first launch would not keep them in the registers of four warps.
MANY_SCORES = 4096


@triton.jit
def _row(pointers, h, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """`[BLOCK_H]` elements of a row of the weight from h on, in fp32."""
    column = h + tl.arange(0, BLOCK_H)
    return tl.load(pointers + column, mask=column < H, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def router_kernel(
    x_ptr, weight_ptr, gate_weight_ptr, logits_ptr, chosen_ptr, weights_ptr, distinct_ptr, count_ptr, gate_ptr,
    arrived_ptr, tokens, stride_x,
    E: tl.constexpr, H: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    ROUNDS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, SETTLED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One logit of every token: expert `program_id(0)`, or behind the last expert the gate of a shared one."""
    if OVERLAP:
        gdc_launch_dependents()
    expert = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    ok_t = t < tokens
    row_ptr = weight_ptr + expert.to(tl.int64) * H
    if gate_weight_ptr is not None:
        if expert == E:
            row_ptr = gate_weight_ptr
    if OVERLAP and not SETTLED:
        gdc_wait()
    first = _row(row_ptr, 0, H, BLOCK_H)
    if OVERLAP and SETTLED:
        gdc_wait()
    column = tl.arange(0, BLOCK_H)
    x_tile_ptr = x_ptr + t[:, None] * stride_x + column[None, :]  # [BLOCK_T, BLOCK_H]
    x = tl.load(x_tile_ptr, mask=ok_t[:, None] & (column < H)[None, :], other=0.0)
    acc = x.to(tl.float32) * first[None, :]
    for h in tl.range(BLOCK_H, H, BLOCK_H, num_stages=STAGES):
        x = tl.load(x_tile_ptr + h, mask=ok_t[:, None] & (h + column < H)[None, :], other=0.0)
        acc += x.to(tl.float32) * _row(row_ptr, h, H, BLOCK_H)[None, :]
    # A linear layer would give the logit in this dtype.
    logit = tl.sum(acc, 1).to(x_ptr.dtype.element_ty).to(tl.float32)  # [BLOCK_T]
    tl.store(logits_ptr + t * E + expert, logit, mask=ok_t & (expert < E))
    if gate_ptr is not None:
        tl.store(gate_ptr + t, logit, mask=ok_t & (expert == E))
    # Every thread has stored its logits before one of them counts the program.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        tl.store(arrived_ptr, 0)
        e = tl.arange(0, BLOCK_E)
        k = tl.arange(0, BLOCK_K)
        ok_e = e < E
        # .cg bypasses the L1 cache, which may hold values from before another program wrote.
        logits = tl.load(
            logits_ptr + t[:, None] * E + e[None, :], mask=ok_t[:, None] & ok_e[None, :], other=0.0, cache_modifier=".cg"
        )
        chosen, weights, taken = choose(logits, ok_e, K, BLOCK_K, SIGMOID, NORMALISE)
        if ROUNDS:
            weights = weights.to(x_ptr.dtype.element_ty).to(tl.float32)
        pair = t[:, None] * K + k[None, :]
        ok = ok_t[:, None] & (k < K)[None, :]
        tl.store(chosen_ptr + pair, chosen, mask=ok)
        tl.store(weights_ptr + pair, weights, mask=ok)
        if distinct_ptr is not None:
            used = tl.max((taken & ok_t[:, None]).to(tl.int32), 0)  # [BLOCK_E]
            tl.store(distinct_ptr + tl.cumsum(used, 0) - 1, e, mask=used > 0)
            tl.store(count_ptr, tl.sum(used, 0))


@triton.jit(do_not_specialize=["tokens"])
def choice_kernel(
    logits_ptr, chosen_ptr, weights_ptr, counts_ptr, ranks_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, ROUNDS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The experts of BLOCK_T tokens; each pair takes the next number of its expert."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    ok_t, ok_e = t < tokens, e < E
    logits = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=ok_t[:, None] & ok_e[None, :], other=0.0)
    chosen, weights, _ = choose(logits.to(tl.float32), ok_e, K, BLOCK_K, SIGMOID, NORMALISE)
    if ROUNDS:
        weights = weights.to(logits_ptr.dtype.element_ty).to(tl.float32)
    pair = t[:, None] * K + k[None, :]  # [BLOCK_T, BLOCK_K]
    ok = ok_t[:, None] & (k < K)[None, :]
    tl.store(chosen_ptr + pair, chosen, mask=ok)
    tl.store(weights_ptr + pair, weights, mask=ok)
    # Which numbers the pairs of an expert get differs from run to run; no result depends on it.
    ranks = tl.atomic_add(counts_ptr + chosen, tl.full([BLOCK_T, BLOCK_K], 1, tl.int32), mask=ok, sem="relaxed")
    tl.store(ranks_ptr + pair, ranks, mask=ok)


def _check(x: Tensor, weight: Tensor, top_k: int, scoring: str, gate_weight: Tensor | None) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES or x.stride(1) != 1 or not x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()}, {x.dtype}, must be [T, H], contiguous in its last dimension, "
            f"of a dtype among {DTYPES}"
        )
    expected = f"[E, {x.shape[1]}] with E from 1 to {MOST_EXPERTS}, contiguous, {x.dtype}"
    for name, tensor in (("weight", weight), ("gate_weight", gate_weight)):
        if tensor is not None and (
            tensor.ndim != 2
            or tensor.shape[1] != x.shape[1]
            or not 1 <= tensor.shape[0] <= (MOST_EXPERTS if name == "weight" else 1)
            or tensor.dtype is not x.dtype
            or not tensor.is_contiguous()
        ):
            raise ValueError(f"{name} {tuple(tensor.shape)}, {tensor.dtype}, is not {expected} (a gate_weight has one row)")
    if not 1 <= top_k <= weight.shape[0]:
        raise ValueError(f"top_k={top_k} must be from 1 to the number of experts, {weight.shape[0]}")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring={scoring!r} must be 'softmax' or 'sigmoid'")


def route(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    *,
    normalise: bool = True,
    scoring: str = "softmax",
    rounds_weights: bool = False,
    gate_weight: Tensor | None = None,
    sums: SplitSums | None = None,
    weights_settled: bool = False,
) -> Routing:
    """The experts of every token; see `reference.route`.

    Args:
        x: `[T, H]` bf16, fp16 or fp32, any stride between rows.
        weight: `[E, H]` of the dtype of x, contiguous.
        top_k: experts a token (K).
        normalise: the weights of a token add up to 1.
        scoring: "softmax" or "sigmoid".
        rounds_weights: the weights are rounded to the dtype of x.
        gate_weight: `[1, H]`, of the logit that gates a shared expert.
        sums: counters, for one stream; made by the call if needed and not given.
        weights_settled: no launch that may still be running writes a weight; see `layer.matvec`.

    Returns:
        With `distinct` and `distinct_count` for few tokens, `counts` and `ranks` for more.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernels.
    """
    _check(x, weight, top_k, scoring, gate_weight)
    overlap = overlaps_launches(arch_of(x.device))
    options = {
        "E": weight.shape[0], "K": top_k, "SIGMOID": scoring == "sigmoid", "NORMALISE": normalise, "ROUNDS": rounds_weights,
        "BLOCK_E": power_of_2(weight.shape[0]), "BLOCK_K": power_of_2(top_k), "OVERLAP": overlap,
        **({"launch_pdl": True} if overlap else {}),
    }  # fmt: skip
    with on_device_of(x):
        if x.shape[0] > FEW_TOKENS:
            return _route_many(x, weight, top_k, gate_weight, options)
        return _route_few(x, weight, top_k, gate_weight, sums, weights_settled, options)


def _route_few(
    x: Tensor, weight: Tensor, top_k: int, gate_weight: Tensor | None, sums: SplitSums | None, settled: bool,
    options: dict[str, Any],
) -> Routing:  # fmt: skip
    tokens, experts = x.shape[0], weight.shape[0]
    numbers = functools.partial(torch.empty, dtype=torch.int32, device=x.device)
    values = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    chosen, weights = numbers((tokens, top_k)), values((tokens, top_k))
    gate = None if gate_weight is None else values(tokens)
    distinct, count = (numbers(min(tokens * top_k, experts)), numbers(1)) if tokens > 1 else (None, None)
    if tokens:
        block_t = power_of_2(tokens)
        prepared(router_kernel)[(experts + (gate is not None),)](
            x, weight, gate_weight, values((tokens, experts)), chosen, weights, distinct, count, gate,
            (sums or SplitSums(x.device)).arrived, tokens, x.stride(0), H=x.shape[1], BLOCK_T=block_t,
            BLOCK_H=min(ELEMENTS // block_t, power_of_2(x.shape[1]), MOST_COLUMNS), STAGES=3, SETTLED=settled,
            num_warps=8 if block_t * experts > MANY_SCORES else 4, **options,
        )  # fmt: skip
    return Routing(chosen, weights, distinct, count, gate=gate)


def _route_many(
    x: Tensor, weight: Tensor, top_k: int, gate_weight: Tensor | None, options: dict[str, Any]
) -> Routing:  # fmt: skip
    tokens, experts = x.shape[0], weight.shape[0]
    numbers = functools.partial(torch.empty, (tokens, top_k), dtype=torch.int32, device=x.device)
    chosen, ranks = numbers(), numbers()
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=x.device)
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    gate = None if gate_weight is None else functional.linear(x, gate_weight)[:, 0].float()
    block_t = max(SCORES // power_of_2(experts), 1)
    prepared(choice_kernel)[(-(-tokens // block_t),)](
        functional.linear(x, weight), chosen, weights, counts, ranks, tokens, BLOCK_T=block_t, num_warps=4, **options
    )  # fmt: skip
    return Routing(chosen, weights, counts=counts, ranks=ranks, gate=gate)
