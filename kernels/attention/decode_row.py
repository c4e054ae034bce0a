"""Decode of a single row, or of a few of 8-bit keys: split-KV attention without a work list.

A program is a (kv head, part) pair: the keys of a kv head are cut into as many even parts as fill the GPU, or as there are
tiles of keys, if these are fewer. Of several rows each gets a part, and of the other parts as many as are due to its length.
The last program to arrive at a row's head merges its parts by LSE, many in one load, in fixed order ("Flash-Decoding", Dao
et al., 2023). The keys of one row are read in a few microseconds; the prefix sums with which `decode.py` balances rows would
take a good part of that. For queries in 16 bits only, over keys of 16 or 8: fp32 needs shorter sums than these parts give.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import element_bytes, row_tile
from hf_fastattn.kernels.attention.eight_bit_tiles import attend_tiles
from hf_fastattn.kernels.attention.new_token import NewToken, append_and_begin, new_options, new_queries
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
from hf_fastattn.kernels.page_formats import is_eight_bits
from hf_fastattn.kernels.relaunch import Launch
from hf_fastattn.kernels.variants.hooks import NO_HOOKS

# More parts of a row than this take longer to merge than they save.
MOST_PARTS = 32
# Keys of all rows, of 8 bits, from which on tiles that no mask cuts have a loop of their own.
MANY_KEYS = 16384
# Rows of 8-bit keys that take this kernel.
MOST_ROWS_OF_8_BITS = 4
# Fp32 elements of partial states in one load of a merging program.
MERGE_ELEMENTS = 8192


@triton.jit(do_not_specialize=["window", "splits", "rows", "stride_table"])
def decode_row_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, seq_lens_ptr, partial_ptr, partial_sum_ptr, arrived_ptr,
    rows, splits, window, scale, softcap, stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MERGE_PARTS: tl.constexpr, OVERLAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HOOKS: tl.constexpr, WHOLE_TILES: tl.constexpr, new_token=None, NEW: tl.constexpr = (0, False, False, False),
):  # fmt: skip
    """One part of one kv head of one of `rows`, ROWS at most; `partial_ptr` holds `[GROUPS * splits, BLOCK_R, BLOCK_D]`.

    `new_token` and NEW are a `NewToken`, if one is to be appended to the only row.
    """
    if OVERLAP and not NEW[2]:
        gdc_wait()
    head = tl.program_id(0) % GROUPS
    number = tl.program_id(0) // GROUPS
    row = 0
    first_part = 0
    if ROWS == 1:
        parts = tl.maximum(tl.minimum(splits, _tiles(seq_lens_ptr, window, BLOCK_N, HAS_WINDOW)), 1)
    else:
        row, first_part, parts = _share(seq_lens_ptr, rows, splits, number, window, ROWS, BLOCK_N, HAS_WINDOW)
        q_ptr += row.to(tl.int64) * stride_qt
        page_table_ptr += row.to(tl.int64) * stride_table
    part = number - first_part
    length = tl.load(seq_lens_ptr + row)
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - window, 0)
    first_tile = lowest // BLOCK_N
    tiles = tl.maximum((length + BLOCK_N - 1) // BLOCK_N - first_tile, 0)
    if OVERLAP and NEW[2]:
        gdc_wait()
    if part < parts:
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        n = tl.arange(0, BLOCK_N)
        ok_d = d < D
        ok_m = m < RATIO
        off_q = (head * RATIO + m) * stride_qh
        row_max, row_sum, acc = empty_state(BLOCK_M, BLOCK_D)
        past = length
        if new_token is None:
            q = tl.load(q_ptr + off_q[:, None] + d[None, :], mask=ok_m[:, None] & ok_d[None, :], other=0.0)
        else:
            past = tl.maximum(length - 1, 0)
            q = new_queries(q_ptr, off_q, ok_m, new_token, D, BLOCK_D, NEW)
            if part == parts - 1:
                row_max, row_sum, acc = append_and_begin(
                    q, head, length, k_ptr, v_ptr, head * stride_head, stride_page, stride_slot, scale, new_token,
                    D, PAGE, NEW,
                )  # fmt: skip
        start = (first_tile + tiles * part // parts) * BLOCK_N
        stop = tl.minimum((first_tile + tiles * (part + 1) // parts) * BLOCK_N, past)
        if k_ptr.dtype.element_ty.primitive_bitwidth == 8:
            last_key = tl.zeros([BLOCK_M], tl.int32) + (length - 1)
            row_max, row_sum, acc = attend_tiles(
                q, row_max, row_sum, acc, start, stop, k_ptr, v_ptr, page_table_ptr, head * stride_head, last_key, lowest,
                length, window, scale, softcap, stride_page, stride_slot, 0, head, m, last_key, None,
                D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, HAS_WINDOW, HAS_SOFTCAP, "tf32", HOOKS,
                WHOLE_TILES=WHOLE_TILES,
            )  # fmt: skip
        else:
            for key in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
                key_n = key + n  # [BLOCK_N]
                ok_n = (key_n < past) & (key_n >= lowest)
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
            out_row = (row * GROUPS + head) * RATIO + m
            out, lse = softmax_end(row_max, row_sum, acc)
            store_output(out_ptr, lse_ptr, out_row, ok_m, out, lse, D)
        else:
            at = (head * splits + number) * BLOCK_R + m  # [BLOCK_M], of which the first BLOCK_R are stored
            ok_r = m < BLOCK_R
            tl.store(partial_ptr + at[:, None] * BLOCK_D + d[None, :], acc, mask=ok_r[:, None])
            # Maximum and sum are kept apart: their logarithm in one number would round the weight of the part.
            tl.store(partial_sum_ptr + at * 2, row_max, mask=ok_r)
            tl.store(partial_sum_ptr + at * 2 + 1, row_sum, mask=ok_r)
            # Every thread has stored its share of the part before one of them counts it.
            tl.debug_barrier()
            counter_ptr = arrived_ptr + row * GROUPS + head
            arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            if arrived == parts - 1:
                tl.store(counter_ptr, 0)
                r = tl.arange(0, BLOCK_R)
                total_max, total_sum, total = merged_parts(
                    partial_ptr, partial_sum_ptr, head * splits + first_part, parts, BLOCK_R, BLOCK_D, MERGE_PARTS
                )
                out_row = (row * GROUPS + head) * RATIO + r
                ok_out = r < RATIO
                out, lse = softmax_end(total_max, total_sum, total)
                store_output(out_ptr, lse_ptr, out_row, ok_out, out, lse, D)


@triton.jit
def _tiles(seq_lens_ptr, window, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Tiles of keys that the row with this length reads."""
    length = tl.load(seq_lens_ptr)
    first_tile = 0
    if HAS_WINDOW:
        first_tile = tl.maximum(length - window, 0) // BLOCK_N
    return tl.maximum((length + BLOCK_N - 1) // BLOCK_N - first_tile, 0)


@triton.jit
def _share(
    seq_lens_ptr, rows, splits, number, window, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr
):  # fmt: skip
    """The row of part `number`, the number of its first part, and how many it has; 0 parts past those of the last row."""
    total = 1
    for r in tl.static_range(ROWS):
        if r < rows:
            total += _tiles(seq_lens_ptr + r, window, BLOCK_N, HAS_WINDOW)
    row = 0
    first_part = 0
    parts = 0
    begin = 0
    for r in tl.static_range(ROWS):
        if r < rows:
            tiles = _tiles(seq_lens_ptr + r, window, BLOCK_N, HAS_WINDOW)
            share = tl.minimum(1 + (splits - rows) * tiles // total, tl.maximum(tiles, 1))
            here = (number >= begin) & (number < begin + share)
            row = tl.where(here, r, row)
            first_part = tl.where(here, begin, first_part)
            parts = tl.where(here, share, parts)
            begin += share
    return row, first_part, parts


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
    new: NewToken | None = None,
) -> tuple[Tensor, Tensor, Launch]:
    """`decode.decode_launch` of one row, or of a few of 8-bit keys, with one new token each; arguments are checked."""
    rows, heads, dim = q.shape
    page, groups = k_pages.shape[1], k_pages.shape[2]
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    ratio, block_d, arch = heads // groups, power_of_2(dim), arch_of(q.device)
    tile = row_tile(arch, element_bytes(q, k_pages), block_d, ratio, groups, workspace.processors)
    splits = max(min(tile.programs * workspace.processors // groups, MOST_PARTS * rows), rows)
    block_r = power_of_2(ratio)
    partial, partial_sum, arrived = workspace.split_kv(groups * splits, block_r, block_d)
    overlap = overlaps_launches(arch)
    factor, cap = score_factors(scale, softcap)
    launch = Launch(
        decode_row_kernel, (groups * splits,),
        (
            q, k_pages, v_pages, out, lse, page_table, seq_lens, partial, partial_sum, arrived,
            rows, splits, window or 0, factor, cap, q.stride(0), q.stride(1),
            k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
        ),
        dict(
            ROWS=power_of_2(rows), GROUPS=groups, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
            BLOCK_M=max(block_r, 16), BLOCK_R=block_r, BLOCK_N=tile.block_n, STAGES=tile.stages,
            MERGE_PARTS=max(min(MERGE_ELEMENTS // (block_r * block_d), 16), 1),
            OVERLAP=overlap, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None, HOOKS=NO_HOOKS,
            WHOLE_TILES=not is_eight_bits(k_pages) or rows * page_table.shape[1] * page >= MANY_KEYS, **new_options(new),
            num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
        ),
    )  # fmt: skip
    with on_device_of(q):
        launch.first()
    return out, lse, launch
