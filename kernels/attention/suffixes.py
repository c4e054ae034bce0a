"""The second launch of `shared_prefix.py`: every row's suffix, merged with its prefixes, which the first launch computes.

A program takes a part of the suffix of one (row, kv head). It begins as soon as the launches ahead of the first one have
ended, beside the programs of the first launch, and waits for these only when its part is computed. The last program to
arrive at a row and kv head merges the parts of the suffix and of the prefixes by LSE in fixed order, so results are bitwise
repeatable. Parts are as many as there are PART_KEYS keys, within the number that the launch has programs for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import Tile, stages_with
from hf_fastattn.kernels.attention.eight_bit_tiles import attend_tiles
from hf_fastattn.kernels.attention.hooked import hooked_query
from hf_fastattn.kernels.attention.prefix_lists import PLACE, prefix_of_row, store_state
from hf_fastattn.kernels.attention.tile import attention_end, empty_state, merge_step, score_factors, store_output
from hf_fastattn.kernels.launch import arch_of, dot_precision, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import CompiledVariant

# Fewest keys of a part of a suffix.
PART_KEYS = tl.constexpr(128)
# Bits of an empty state's maximum and sum, -inf and 0.
EMPTY = tl.constexpr(0xFF800000)
# Fp32 elements of partial states that a thread has in flight, and the most of these states.
MERGE_ELEMENTS, MOST_MERGED = 64, 16


@triton.jit(do_not_specialize=["prefix_groups", "suffix_base", "stride_table"])
def suffix_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
    partial_ptr, partial_sum_ptr, places_ptr, arrived_ptr,
    prefix_groups, suffix_base, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr, LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MERGE_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
):  # fmt: skip
    """One part of the suffix of a (row, kv head); nothing if the row has fewer parts."""
    head = tl.program_id(0)
    b = tl.program_id(1)
    part = tl.program_id(2)
    most_parts = tl.num_programs(2)
    length = tl.load(seq_lens_ptr + b)
    start, shares = prefix_of_row(group_starts_ptr, prefix_lens_ptr, b, prefix_groups, BLOCK_P, LEVELS)
    # A row without keys sees no prefix, whatever its group has.
    shares = tl.where(length > 0, shares, 0)
    tiles = (tl.maximum(length - start, 0) + BLOCK_N - 1) // BLOCK_N
    parts = tl.minimum(tl.maximum((tiles * BLOCK_N + PART_KEYS - 1) // PART_KEYS, 1), most_parts)
    if part < parts:
        s = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        ok_s = s < RATIO  # [BLOCK_S]
        off_q = b.to(tl.int64) * stride_qt + (head * RATIO + s) * stride_qh  # [BLOCK_S]
        # .cg, here and below, bypasses the L1 cache, which may hold values from before another launch wrote.
        q = tl.load(
            q_ptr + off_q[:, None] + d[None, :], mask=ok_s[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg"
        )
        h = head * RATIO + tl.minimum(s, RATIO - 1)
        q_idx = tl.zeros_like(s) + length - 1
        q = hooked_query(q, h, q_idx, tensors, HOOKS, q_ptr + off_q, ok_s, D, BLOCK_N)
        row_max, row_sum, acc = empty_state(BLOCK_S, BLOCK_D)
        last_key = tl.full([BLOCK_S], 0, tl.int32) + length
        table = page_table_ptr + b.to(tl.int64) * stride_table
        lo = start + tiles * part // parts * BLOCK_N
        hi = tl.minimum(start + tiles * (part + 1) // parts * BLOCK_N, length)
        row_max, row_sum, acc = attend_tiles(
            q, row_max, row_sum, acc, lo, hi, k_ptr, v_ptr, table, head * stride_head,
            last_key, 0, length, 0, scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
            D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, False, HAS_SOFTCAP, PRECISION, HOOKS,
        )  # fmt: skip
        # Only after the loop: the next launch prefetches weights, which would compete with the keys for bandwidth.
        if OVERLAP:
            gdc_launch_dependents()
        pair = b * GROUPS + head
        r = tl.arange(0, BLOCK_R)
        ok_r = r < RATIO  # [BLOCK_R]
        row_max, row_sum, acc = first_rows(row_max, row_sum, acc, BLOCK_R)
        ends = True
        own = suffix_base + pair * (most_parts * BLOCK_R)
        if parts > 1:
            store_state(partial_ptr, partial_sum_ptr, own + part * BLOCK_R + r, ok_r, row_max, row_sum, acc)
            # Every thread has stored its share of the part before one of them counts it.
            tl.debug_barrier()
            ends = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu") == parts - 1
            if ends:
                tl.store(arrived_ptr + pair, 0)
                row_max, row_sum, acc = empty_state(BLOCK_R, BLOCK_D)
        if ends:
            # The parts of the suffix, then those of each level, in one loop, which is compiled once.
            for level in range(tl.where(parts > 1, -1, 0), LEVELS):
                first = own
                count = parts
                stride = BLOCK_R
                skipped = 0
                if level >= 0:
                    if OVERLAP:
                        gdc_wait()
                    place_ptr = places_ptr + pair * PLACE + level * 2
                    has_prefix = (shares >> level) % 2 > 0
                    first = tl.load(place_ptr, mask=has_prefix, other=0, cache_modifier=".cg")
                    count = tl.load(place_ptr + 1, mask=has_prefix, other=0, cache_modifier=".cg")
                    # A split prefix starts in the second block of its first program, and goes on in the first of the others.
                    stride = 2 * BLOCK_M
                    skipped = BLOCK_M
                merged_max, merged_sum, merged = merged_states(
                    partial_ptr, partial_sum_ptr, first, count, stride, skipped, r, ok_r, BLOCK_D, MERGE_PARTS
                )
                row_max, row_sum, acc = merge_step(merged_max, merged_sum, merged, row_max, row_sum, acc)
            h_r = head * RATIO + tl.minimum(r, RATIO - 1)
            q_idx_r = tl.zeros_like(r) + length - 1
            out, lse = attention_end(row_max, row_sum, acc, h_r, q_idx_r, tensors, HOOKS)
            store_output(out_ptr, lse_ptr, pair.to(tl.int64) * RATIO + r, ok_r, out, lse, D)


@triton.jit
def first_rows(row_max, row_sum, acc, ROWS: tl.constexpr):
    """The state of the first ROWS query rows: merging takes no time and registers for rows that the matrix unit needs."""
    if acc.shape[0] > ROWS:
        PIECES: tl.constexpr = acc.shape[0] // ROWS
        kept = tl.arange(0, PIECES)[:, None] == 0
        acc = tl.sum(tl.where(kept[:, :, None], tl.reshape(acc, (PIECES, ROWS, acc.shape[1])), 0.0), 0)
        row_max = tl.sum(tl.where(kept, tl.reshape(row_max, (PIECES, ROWS)), 0.0), 0)
        row_sum = tl.sum(tl.where(kept, tl.reshape(row_sum, (PIECES, ROWS)), 0.0), 0)
    return row_max, row_sum, acc


@triton.jit
def merged_states(
    partial_ptr, partial_sum_ptr, first, parts, stride, skipped, r, ok_r, BLOCK_D: tl.constexpr, MERGE_PARTS: tl.constexpr
):
    """`parts` partial states, merged; number i lies in the rows `first + max(i * stride - skipped, 0) + r`.

    MERGE_PARTS of them are one block, whose loads are in flight together. Unrolled, with a load for each, they took longer
    to compile than all else. A thread holds the same columns of all of them, since rows come before parts in the block.
    """
    # From an empty state, not from the one that the matrix unit left, whose layout would be kept: every step would exchange
    # maxima and sums through shared memory.
    row_max, row_sum, acc = empty_state(r.shape[0], BLOCK_D)
    u = tl.arange(0, MERGE_PARTS)
    d = tl.arange(0, BLOCK_D)
    for number in range(0, parts, MERGE_PARTS):
        i = number + u  # [MERGE_PARTS]
        at = (first + tl.maximum(i * stride - skipped, 0))[None, :] + r[:, None]  # [BLOCK_R, MERGE_PARTS]
        ok = (i < parts)[None, :] & ok_r[:, None]
        part_max, part_sum = load_sums(partial_sum_ptr, at, ok)
        states = tl.load(
            partial_ptr + at[:, :, None] * BLOCK_D + d[None, None, :], mask=ok[:, :, None], other=0.0, cache_modifier=".cg"
        )  # [BLOCK_R, MERGE_PARTS, BLOCK_D]
        new_max = tl.max(part_max, 1)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(part_max - shift[:, None])
        merged_sum = tl.sum(part_sum * weights, 1)
        merged = tl.sum(states * weights[:, :, None], 1)
        row_max, row_sum, acc = merge_step(new_max, merged_sum, merged, row_max, row_sum, acc)
    return row_max, row_sum, acc


@triton.jit
def load_sums(ptr, at, ok):
    """Maximum and sum of the states `at`, in its shape, in one load; those of an empty state if not `ok`."""
    pair = tl.load(ptr.to(tl.pointer_type(tl.int64)) + at, mask=ok, other=EMPTY, cache_modifier=".cg")
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


def suffixes_with_prefixes(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    group_starts: Tensor,
    prefix_lens: Tensor,
    partial: Tensor,
    partial_sum: Tensor,
    places: Tensor,
    arrived: Tensor,
    *,
    suffix_base: int,
    block_m: int,
    tile: Tile,
    parts: int,
    scale: float,
    softcap: float | None,
    variant: CompiledVariant,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of every query head; see `shared_prefix.paged_decode_shared` for what is not here.

    Args:
        partial: `[states, BLOCK_D]` fp32, sums of weighted values, not normalised: those of prefixes, and from `suffix_base`
            on room for those of suffixes.
        partial_sum: `[states, 2]` fp32, maximum (base 2) and sum of the weights of each.
        places: `[B * G, PLACE]` int32; see `PLACE`.
        arrived: `[B * G]` int32, zero.
        block_m: states from a program's block to its next, of prefixes.
        tile: launch configuration.
        parts: programs of each (row, kv head), the most parts of its suffix.

    Returns:
        Output `[B, H, D]` and LSE `[B, H]` fp32, natural logarithm; 0 and -inf for a row without keys.
    """
    rows, heads, dim = q.shape
    page, kv_heads, groups = k_pages.shape[1], k_pages.shape[2], prefix_lens.shape[-1]
    levels, ratio = (prefix_lens.shape[0] if prefix_lens.ndim == 2 else 1), heads // kv_heads
    factor, cap = score_factors(scale, softcap, variant.hooks)
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    overlap = overlaps_launches(arch_of(q.device))
    block_s, block_r, block_d = max(power_of_2(ratio), 16), power_of_2(ratio), power_of_2(dim)
    merged = min(max(MERGE_ELEMENTS * 32 * tile.warps // (block_r * block_d), 1), MOST_MERGED)
    with on_device_of(q):
        prepared(suffix_kernel)[(kv_heads, rows, parts)](
            q, k_pages, v_pages, out, lse, page_table, seq_lens, group_starts, prefix_lens,
            partial, partial_sum, places, arrived,
            groups, suffix_base, factor, cap,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            variant.tensors,
            GROUPS=kv_heads, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
            BLOCK_P=max(power_of_2(groups), 16), LEVELS=levels, BLOCK_M=block_m, BLOCK_S=block_s,
            BLOCK_R=block_r, BLOCK_N=tile.block_n, STAGES=stages_with(variant, tile.stages, block_s, tile.block_n),
            MERGE_PARTS=merged, OVERLAP=overlap, HAS_SOFTCAP=softcap is not None,
            PRECISION=dot_precision(q.dtype), HOOKS=variant.hooks_for(q.dtype),
            num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out, lse
