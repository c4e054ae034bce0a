"""The tokens that typical sampling keeps, found without sorting.

Typical sampling (Meister et al., 2022) keeps the tokens whose information `-log p` is nearest to the entropy, until they
hold a mass: the least distance t such that tokens as near as t hold it. One program a row sums up the entropy, gathers the
finite scores, and bisects over the keys (`threshold.py`) of the negated distances; a row with more of them than SLOTS is
read again for every two bits. With x relative to the greatest score, S and W the sums of `e^x` and `x e^x`, the distance of
a token is `|W / S - x|`. The plain PyTorch version is `reference.typical_scores`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.sampling.scores import LARGEST, LOG2E, load_scores
from hf_fastattn.kernels.sampling.threshold import order_key, search_block

# Finite scores of a row that are looked at in registers; tokens of one step over a whole row.
SLOTS, TILE = 4096, 8192


@triton.jit
def _nearness(x, middle):
    """Keys that grow as tokens of relative score x come nearer to the entropy, and their weights, both in the shape of x."""
    there = x > float("-inf")
    return order_key(-tl.abs(middle - x), 0), tl.where(there, tl.exp2(x * LOG2E), 0.0)


@triton.jit
def _relative(row_ptr, vocab, begin, peak, TILE: tl.constexpr):
    """Scores relative to the greatest one, `[TILE]`."""
    token = begin + tl.arange(0, TILE)
    return load_scores(row_ptr, token, token < vocab) - peak


@triton.jit
def _search_row(row_ptr, vocab, peak, middle, low, high, need, TILE: tl.constexpr):
    """`search_block` over a whole row: each pass decides two bits of the key."""
    while high - low > 1:
        quarter = (high - low) // 4
        key1, key2, key3 = low + quarter, low + (high - low) // 2, high - tl.maximum(quarter, 1)
        sum1 = tl.zeros([], tl.float32)
        sum2, sum3 = sum1, sum1
        for begin in range(0, vocab, TILE):
            key, weight = _nearness(_relative(row_ptr, vocab, begin, peak, TILE), middle)
            sum1 += tl.sum(tl.where(key >= key1, weight, 0.0), 0)
            sum2 += tl.sum(tl.where(key >= key2, weight, 0.0), 0)
            sum3 += tl.sum(tl.where(key >= key3, weight, 0.0), 0)
        high = tl.where(sum1 < need, key1, tl.where(sum2 < need, key2, tl.where(sum3 < need, key3, high)))
        low = tl.where(sum3 >= need, key3, tl.where(sum2 >= need, key2, tl.where(sum1 >= need, key1, low)))
    return low


@triton.jit
def typical_kernel(
    scores_ptr, slots_ptr, out_ptr, mass_ptr, vocab, stride_b, stride_o,
    SLOTS: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of `[B, vocab]`; `slots_ptr: [B, SLOTS]` gets its finite scores if there are no more of them."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    row_ptr, slot_ptr, write_ptr = scores_ptr + b * stride_b, slots_ptr + b * SLOTS, out_ptr + b * stride_o
    peak = tl.full([], -LARGEST, tl.float32)
    for begin in range(0, vocab, TILE):
        peak = tl.maximum(peak, tl.max(_relative(row_ptr, vocab, begin, 0.0, TILE), 0))
    total = tl.zeros([], tl.float32)
    weighted, count = total, tl.zeros([], tl.int32)
    for begin in range(0, vocab, TILE):
        x = _relative(row_ptr, vocab, begin, peak, TILE)
        there = x > float("-inf")
        weight = tl.where(there, tl.exp2(x * LOG2E), 0.0)
        total += tl.sum(weight, 0)
        weighted += tl.sum(tl.where(there, weight * x, 0.0), 0)
        slot = count + tl.cumsum(there.to(tl.int32), 0) - 1
        tl.store(slot_ptr + slot, x, mask=there & (slot < SLOTS))
        count += tl.sum(there.to(tl.int32), 0)
    tl.debug_barrier()
    middle = weighted / tl.maximum(total, 1e-30)
    need = tl.load(mass_ptr) * total
    # Distances are finite: their negatives are below 0 and above the least number.
    low = order_key(tl.full([], -LARGEST, tl.float32), 0)
    high = tl.full([], 1, tl.int32)
    if count <= SLOTS:
        place = tl.arange(0, SLOTS)
        x = tl.load(slot_ptr + place, mask=place < count, other=float("-inf"))
        key, weight = _nearness(x, middle)
        low = search_block(key, weight, low, high, need)
    else:
        low = _search_row(row_ptr, vocab, peak, middle, low, high, need, TILE)
    for begin in range(0, vocab, TILE):
        token = begin + tl.arange(0, TILE)
        x = load_scores(row_ptr, token, token < vocab)
        key, _ = _nearness(x - peak, middle)
        tl.store(write_ptr + token, tl.where(key >= low, x, float("-inf")), mask=token < vocab)


def typical_scores(scores: Tensor, mass: Tensor) -> Tensor:
    """Scores after typical sampling: -inf for the tokens that it drops.

    NaN counts as -inf. Tokens as near to the entropy as the last one kept are kept too.

    Args:
        scores: `[B, V]` fp32, any stride between rows.
        mass: `[1]` fp32, the share of the mass to keep, above 0 and below 1.

    Returns:
        A new tensor `[B, V]` fp32.

    Raises:
        ValueError: shapes, dtypes or strides do not fit the kernel.
    """
    if scores.ndim != 2 or scores.dtype != torch.float32 or scores.stride(-1) != 1 or not 0 < scores.shape[1] < 1 << 24:
        raise ValueError(
            f"scores {tuple(scores.shape)} with strides {scores.stride()}, {scores.dtype}, must be [B, V], fp32, contiguous "
            f"in the last dimension"
        )
    if mass.shape != (1,) or mass.dtype != torch.float32:
        raise ValueError(f"mass {tuple(mass.shape)}, {mass.dtype}, must be [1], fp32")
    rows, vocab = scores.shape
    out = torch.empty((rows, vocab), dtype=torch.float32, device=scores.device)
    slots = torch.empty((rows, SLOTS), dtype=torch.float32, device=scores.device)
    if not rows:
        return out
    overlap = overlaps_launches(arch_of(scores.device))
    with on_device_of(scores):
        prepared(typical_kernel)[(rows,)](
            scores, slots, out, mass, vocab, scores.stride(0), out.stride(0),
            SLOTS=SLOTS, TILE=TILE, OVERLAP=overlap, num_warps=16, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out
