"""The second launch of `shared_prefix.py`: a row's prefix and suffix, each in one or more parts, merged by LSE.

The parts of a split prefix lie BLOCK_M rows apart, those of a split suffix BLOCK_S rows, in the order of the programs that
computed them. They are merged in that order, so results are bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.tile import attention_end, empty_state, merge_step, store_output
from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import CompiledVariant

# Levels of prefixes within prefixes.
MOST_LEVELS = 3
# Int32 numbers for each (row, kv head): of every level the row of the prefix's first state and the number of its states, the
# same two of the suffix, and which of the levels have a prefix, a bit each. Padded for alignment.
PLACE = tl.constexpr(16)
# Fp32 elements of partial states that a program has in flight.
MERGE_ELEMENTS = 4096


@triton.jit
def merge_prefixes_kernel(
    partial_ptr, partial_sum_ptr, places_ptr, seq_lens_ptr, out_ptr, lse_ptr, tensors,
    RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, MERGE_PARTS: tl.constexpr, OVERLAP: tl.constexpr,
    GROUPS: tl.constexpr, HOOKS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """The R query heads of one (row, kv head)."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0)
    place = places_ptr + pair * PLACE
    suffix = tl.load(place + LEVELS * 2)
    suffix_parts = tl.load(place + LEVELS * 2 + 1)
    shares = tl.load(place + LEVELS * 2 + 2)
    first, parts = prefix_place(place, shares, 0, LEVELS)
    first_1, parts_1 = prefix_place(place, shares, 1, LEVELS)
    first_2, parts_2 = prefix_place(place, shares, 2, LEVELS)
    prefix_parts = parts + parts_1 + parts_2
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    row_max, row_sum, acc = empty_state(BLOCK_R, BLOCK_D)
    for number in range(0, prefix_parts + suffix_parts, MERGE_PARTS):
        # Unrolled, and without a reduction over threads: the loads of MERGE_PARTS parts are in flight together.
        for u in tl.static_range(MERGE_PARTS):
            i = number + u
            j = i - prefix_parts
            # A split item starts in the second block of its first program, and goes on in the first block of the others.
            start = tl.where(j < 0, first + tl.maximum(2 * i - 1, 0) * BLOCK_M, suffix + tl.maximum(2 * j - 1, 0) * BLOCK_S)
            if LEVELS > 1:
                k = i - parts
                start = tl.where((k >= 0) & (j < 0), first_1 + tl.maximum(2 * k - 1, 0) * BLOCK_M, start)
            if LEVELS > 2:
                k = i - parts - parts_1
                start = tl.where((k >= 0) & (j < 0), first_2 + tl.maximum(2 * k - 1, 0) * BLOCK_M, start)
            ok = r < tl.where(j < suffix_parts, RATIO, 0)
            at = start + r  # [BLOCK_R]
            part_max = tl.load(partial_sum_ptr + at * 2, mask=ok, other=float("-inf"))
            part_sum = tl.load(partial_sum_ptr + at * 2 + 1, mask=ok, other=0.0)
            part_acc = tl.load(partial_ptr + at[:, None] * BLOCK_D + d[None, :], mask=ok[:, None], other=0.0)
            row_max, row_sum, acc = merge_step(part_max, part_sum, part_acc, row_max, row_sum, acc)
    h = pair % GROUPS * RATIO + tl.minimum(r, RATIO - 1)
    q_idx = r * 0
    if HOOKS.output_transform is not None:
        q_idx += tl.load(seq_lens_ptr + pair // GROUPS) - 1
    out, lse = attention_end(row_max, row_sum, acc, h, q_idx, tensors, HOOKS)
    store_output(out_ptr, lse_ptr, pair.to(tl.int64) * RATIO + r, r < RATIO, out, lse, D)


@triton.jit
def prefix_place(place, shares, LEVEL: tl.constexpr, LEVELS: tl.constexpr):
    """Row of a prefix's first state, and the number of its states; where there is none, they were not written."""
    first = 0
    parts = 0
    if LEVEL < LEVELS:
        has_prefix = (shares >> LEVEL) % 2 > 0
        first = tl.load(place + LEVEL * 2, mask=has_prefix, other=0)
        parts = tl.load(place + LEVEL * 2 + 1, mask=has_prefix, other=0)
    return first, parts


def merge_prefixes(
    partial: Tensor,
    partial_sum: Tensor,
    places: Tensor,
    seq_lens: Tensor,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    block_m: int,
    block_s: int,
    *,
    levels: int,
    overlap: bool,
    variant: CompiledVariant,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of every query head from the states that `shared_prefix_kernel` has left.

    Args:
        partial: `[states, BLOCK_D]` fp32, sums of weighted values, not normalised.
        partial_sum: `[states, 2]` fp32, maximum (base 2) and sum of the weights of each.
        places: `[B * G, PLACE]` int32; see `PLACE`.
        seq_lens: `[B]` int32, keys of each row.
        shape: B, H and D.
        dtype: of the output.
        block_m: states from a program's block to its next, of prefixes.
        block_s: the same of suffixes.
        levels: of prefixes.
        overlap: start before the launch ahead ends, and wait for it inside.
        variant: its sinks, normaliser and transform of the output.

    Returns:
        Output `[B, H, D]` and LSE `[B, H]` fp32, natural logarithm; 0 and -inf for a row without keys.
    """
    rows, heads, dim = shape
    out = torch.empty(shape, dtype=dtype, device=partial.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=partial.device)
    ratio = rows * heads // places.shape[0]
    block_r, block_d = power_of_2(ratio), power_of_2(dim)
    with on_device_of(partial):
        prepared(merge_prefixes_kernel)[(places.shape[0],)](
            partial, partial_sum, places, seq_lens if variant.hooks.output_transform else None, out, lse, variant.tensors,
            RATIO=ratio, D=dim, BLOCK_D=block_d, BLOCK_R=block_r, BLOCK_M=block_m, BLOCK_S=block_s,
            MERGE_PARTS=min(max(MERGE_ELEMENTS // (block_r * block_d), 1), 8), OVERLAP=overlap,
            GROUPS=places.shape[0] // max(rows, 1), LEVELS=levels, HOOKS=variant.hooks_for(dtype),
            num_warps=min(max(block_r * block_d // 128, 1), 4), **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out, lse
