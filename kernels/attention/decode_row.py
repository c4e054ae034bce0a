"""Decode of a single row: split-KV attention without a work list, since one row needs no balancing.

A program is a (kv head, part) pair: the keys of a kv head are cut into as many even parts as fill the GPU, or as there are
tiles of keys, if these are fewer. The last program to arrive at a head merges its parts by LSE, many in one load, in fixed
order ("Flash-Decoding", Dao et al., 2023). The keys of one row are read in a few microseconds; the prefix sums with which
`decode.py` balances rows would take a good part of that. In 16 bits only: fp32 needs shorter sums than these parts give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import split_kv_tile
from hf_fastattn.kernels.attention.tile import (
    empty_state,
    score_factors,
    softmax_end,
    softmax_step,
    store_output,
    tile_scores,
)
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.launch import arch_of, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.relaunch import Launch

# More parts than this take longer to merge than they save.
MOST_PARTS = 32
# Fp32 elements of partial states in one load of a merging program.
MERGE_ELEMENTS = 8192


@triton.jit(do_not_specialize=["window", "splits"])
def decode_row_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, seq_lens_ptr, partial_ptr, partial_sum_ptr, arrived_ptr,
    splits, window, scale, softcap, stride_qh, stride_page, stride_slot, stride_head,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MERGE_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One part of one kv head; `partial_ptr` holds `[GROUPS * splits, BLOCK_R, BLOCK_D]`."""
    if OVERLAP:
        gdc_wait()
    head = tl.program_id(0) % GROUPS
    part = tl.program_id(0) // GROUPS
    length = tl.load(seq_lens_ptr)
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - window, 0)
    first_tile = lowest // BLOCK_N
    tiles = tl.maximum((length + BLOCK_N - 1) // BLOCK_N - first_tile, 0)
    parts = tl.maximum(tl.minimum(splits, tiles), 1)
    if part < parts:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N)
        ok_d = d < D
        ok_m = m < RATIO
        q = tl.load(
            q_ptr + ((head * RATIO + m) * stride_qh)[:, None] + d[None, :], mask=ok_m[:, None] & ok_d[None, :], other=0.0
        )
        row_max, row_sum, acc = empty_state(BLOCK_M, BLOCK_D)
        start = (first_tile + tiles * part // parts) * BLOCK_N
        stop = tl.minimum((first_tile + tiles * (part + 1) // parts) * BLOCK_N, length)
        for key in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
            key_n = key + n  # [BLOCK_N]
            ok_n = (key_n < length) & (key_n >= lowest)
            page = tl.load(page_table_ptr + key_n // PAGE, mask=ok_n, other=0)
            # One offset for K and V, whose strides agree.
            slot = page.to(tl.int64) * stride_page + (key_n % PAGE) * stride_slot
            off_kv = slot[:, None] + (head * stride_head + d)[None, :]  # [BLOCK_N, BLOCK_D]
            ok = ok_n[:, None] & ok_d[None, :]
            k = tl.load(k_ptr + off_kv, mask=ok, other=0.0)
            scores = tile_scores(q, k, scale, softcap, HAS_SOFTCAP, "tf32")  # [BLOCK_M, BLOCK_N]
            scores = tl.where(ok_n[None, :], scores, float("-inf"))
            v = tl.load(v_ptr + off_kv, mask=ok, other=0.0)
            row_max, row_sum, acc = softmax_step(scores, v, row_max, row_sum, acc, scale, HAS_SOFTCAP, "tf32")
        # Only after the loop: the next launch prefetches weights, which would compete with the keys for bandwidth.
        if OVERLAP:
            gdc_launch_dependents()
        if parts == 1:
            out_row = head * RATIO + m
            out, lse = softmax_end(row_max, row_sum, acc)
            store_output(out_ptr, lse_ptr, out_row, ok_m, out, lse, D)
        else:
            at = (head * splits + part) * BLOCK_R + m  # [BLOCK_M], of which the first BLOCK_R are stored
            ok_r = m < BLOCK_R
            tl.store(partial_ptr + at[:, None] * BLOCK_D + d[None, :], acc, mask=ok_r[:, None])
            # Maximum and sum are kept apart: their logarithm in one number would round the weight of the part.
            tl.store(partial_sum_ptr + at * 2, row_max, mask=ok_r)
            tl.store(partial_sum_ptr + at * 2 + 1, row_sum, mask=ok_r)
            # Every thread has stored its share of the part before one of them counts it.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel", scope="gpu")
            if arrived == parts - 1:
                tl.store(arrived_ptr + head, 0)
                r = tl.arange(0, BLOCK_R)
                total_max, total_sum, total = merged_parts(
                    partial_ptr, partial_sum_ptr, head * splits, parts, BLOCK_R, BLOCK_D, MERGE_PARTS
                )
                out_row = head * RATIO + r
                ok_out = r < RATIO
                out, lse = softmax_end(total_max, total_sum, total)
                store_output(out_ptr, lse_ptr, out_row, ok_out, out, lse, D)


@triton.jit
def merged_parts(
    partial_ptr, partial_sum_ptr, first, parts, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, MERGE_PARTS: tl.constexpr
):
    """The state of parts `first` to `first + parts - 1`, MERGE_PARTS of them at a time.

    Not `merge_step`, which takes parts one by one: here the parts of a load are reduced at once, so the rounding differs.
    """
    p = tl.arange(0, MERGE_PARTS)
    r = tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    row_max, row_sum, acc = empty_state(BLOCK_R, BLOCK_D)
    for number in range(0, parts, MERGE_PARTS):
        at = (first + number + p)[:, None] * BLOCK_R + r[None, :]  # [MERGE_PARTS, BLOCK_R]
        ok = (number + p < parts)[:, None] & (r < BLOCK_R)[None, :]
        # .cg bypasses the L1 cache, which may hold values from before another program wrote.
        part_max = tl.load(partial_sum_ptr + at * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
        part_sum = tl.load(partial_sum_ptr + at * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
        part_ptr = partial_ptr + at[:, :, None] * BLOCK_D + d[None, None, :]  # [MERGE_PARTS, BLOCK_R, BLOCK_D]
        part_acc = tl.load(part_ptr, mask=ok[:, :, None], other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.math.exp2(part_max - shift[None, :])
        decay = tl.math.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(part_sum * weight, 0)
        acc = acc * decay[:, None] + tl.sum(part_acc * weight[:, :, None], 0)
        row_max = new_max
    return row_max, row_sum, acc


def decode_row(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Launch]:
    """`decode.decode_launch` of one row with one new token, whose arguments it has checked."""
    _, heads, dim = q.shape
    page, groups = k_pages.shape[1], k_pages.shape[2]
    out = torch.empty((1, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((1, heads), dtype=torch.float32, device=q.device)
    ratio, block_d, arch = heads // groups, power_of_2(dim), arch_of(q.device)
    tile = split_kv_tile(arch, q.element_size(), block_d, ratio, groups, workspace.processors)
    splits = max(min(tile.programs * workspace.processors // groups, MOST_PARTS), 1)
    block_r = power_of_2(ratio)
    partial, partial_sum, arrived = workspace.split_kv(groups * splits, block_r, block_d)
    overlap = overlaps_launches(arch)
    factor, cap = score_factors(scale, softcap)
    launch = Launch(
        decode_row_kernel, (groups * splits,),
        (
            q, k_pages, v_pages, out, lse, page_table, seq_lens, partial, partial_sum, arrived,
            splits, window or 0, factor, cap, q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
        ),
        dict(
            GROUPS=groups, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page, BLOCK_M=max(block_r, 16), BLOCK_R=block_r,
            BLOCK_N=tile.block_n, STAGES=tile.stages,
            MERGE_PARTS=max(min(MERGE_ELEMENTS // (block_r * block_d), 16), 1),
            OVERLAP=overlap, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
            num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
        ),
    )  # fmt: skip
    with on_device_of(q):
        launch.first()
    return out, lse, launch
