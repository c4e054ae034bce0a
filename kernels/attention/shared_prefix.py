"""Paged decode of rows that share prefixes: each prefix is read once for all of its rows, in two launches.

A prefix group is a run of neighbouring rows whose first tokens lie in the same pages. Of prefixes within prefixes (a system
prompt, below it questions, below each of them samples) every level has groups of its own, which begin where those above
them end. The queries of a group's rows and of the R heads of a key/value head are the rows of one matrix product over the
prefix (Ye et al., 2024, "Cascade Inference"; Juravsky et al., 2024, "Hydragen"). The first launch computes the prefixes: its
work list is the tiles of keys by (prefix group, kv head, query block), of which each program computes its range from tensors
on the device ("Stream-K", Osama et al., 2023), so a captured graph follows lengths and groups that changed. On Hopper it is
`hopper_prefixes.py` for large groups, where matrix products take the time. The second launch, `suffixes.py`, reads every
row's suffix beside it, and merges the parts of a row's prefixes and suffix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import (
    element_bytes,
    parts_of_suffixes,
    shared_prefix_tile,
    stages_with,
    suffix_tile,
)
from hf_fastattn.kernels.attention.eight_bit_tiles import attend_tiles
from hf_fastattn.kernels.attention.hooked import hooked_query
from hf_fastattn.kernels.attention.prefix_lists import (
    MOST_LEVELS,
    PLACE,
    equal_range,
    part_rows,
    prefix_entry,
    prefix_list,
    store_state,
    used_programs,
)
from hf_fastattn.kernels.attention.suffixes import suffixes_with_prefixes
from hf_fastattn.kernels.attention.tile import empty_state, score_factors
from hf_fastattn.kernels.attention.work_list import WorkLists
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.launch import (
    ASSEMBLER_OPTIONS,
    arch_of,
    check_pages,
    dot_precision,
    on_device_of,
    overlaps_launches,
    power_of_2,
)
from hf_fastattn.kernels.page_formats import is_eight_bits
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import PLAIN, CompiledVariant

# The Gluon kernel's packed query rows a tile; it is quicker where that share of them is filled (by a single group of rows,
# less is enough), and rows times the keys that a row may have are at least so many.
GLUON_ROWS, GLUON_FILLED, GLUON_FILLED_BY_ONE, GLUON_KEYS = 128, 0.75, 0.5, 160 * 1024


@triton.jit(do_not_specialize=["rows", "prefix_groups", "whole_base", "stride_table"])
def prefixes_kernel(
    q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
    partial_ptr, partial_sum_ptr, places_ptr,
    rows, prefix_groups, whole_base, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, SKIP_MASKS: tl.constexpr,
    OVERLAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
):  # fmt: skip
    """One persistent program: a share of the tiles of prefixes.

    A tile holds the queries of BLOCK_M // RATIO rows. The partial states: two blocks a program, from `whole_base` on those
    of prefixes that are not split.
    """
    if OVERLAP:
        # In this order: the launch behind reads what the launches ahead wrote, before it waits for this one.
        gdc_wait()
        gdc_launch_dependents()
    is_group, upto, blocks = prefix_list(
        group_starts_ptr, prefix_lens_ptr, prefix_groups, BLOCK_P, BLOCK_N, BLOCK_M // RATIO, STEPS, LEVELS
    )  # fmt: skip
    programs = used_programs(tl.num_programs(0), tl.maximum(tl.sum(blocks, 0) * GROUPS, 1))
    attend_prefixes(
        q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
        partial_ptr, partial_sum_ptr, places_ptr,
        tl.program_id(0), programs, tl.max(upto, 0) * GROUPS, upto, is_group, prefix_groups, tl.arange(0, BLOCK_B), rows,
        whole_base, scale, softcap, stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
        GROUPS, RATIO, D, BLOCK_D, PAGE, BLOCK_B, BLOCK_M, BLOCK_N, STAGES, SKIP_MASKS, HAS_SOFTCAP, PRECISION,
        HOOKS, STEPS, LEVELS,
    )  # fmt: skip


@triton.jit
def attend_prefixes(
    q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
    partial_ptr, partial_sum_ptr, places_ptr,
    number, programs, total, upto, is_group, prefix_groups, row, rows, whole_base, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    SKIP_MASKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
    STEPS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Tiles of prefixes, the range of program `number` of `programs`: states of the queries of all rows that share them.

    `upto: [BLOCK_P]` says where each prefix group ends in the list.
    """
    TILE_ROWS: tl.constexpr = BLOCK_M // RATIO
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    position, end, share, extra = equal_range(number, programs, total)
    while position < end:
        level, first_row, past_row, tile_row, head, begin, length, count, unit = prefix_entry(
            position, upto, is_group, group_starts_ptr, prefix_lens_ptr, prefix_groups, GROUPS, BLOCK_N, TILE_ROWS,
            STEPS, LEVELS,
        )  # fmt: skip
        take = tl.minimum(count - unit, end - position)
        token = tile_row + m // RATIO  # [BLOCK_M], a token a row
        # A row without keys may hold no pages: the table of the group's first row with keys is read.
        active = tl.load(seq_lens_ptr + row, mask=(row >= first_row) & (row < past_row), other=0) > 0  # [BLOCK_B]
        reader = tl.min(tl.where(active, row, BLOCK_B), 0)
        if reader < BLOCK_B:
            ok_m = (m < TILE_ROWS * RATIO) & (token < past_row)
            off_q = token.to(tl.int64) * stride_qt + (head * RATIO + m % RATIO) * stride_qh
            q = tl.load(q_ptr + off_q[:, None] + d[None, :], mask=ok_m[:, None] & (d < D)[None, :], other=0.0)
            h = head * RATIO + m % RATIO
            # Each row's query is at the end of its own keys.
            q_idx = tl.load(seq_lens_ptr + token, mask=ok_m, other=1) - 1
            q = hooked_query(q, h, q_idx, tensors, HOOKS, q_ptr + off_q, ok_m, D, BLOCK_N)
            row_max, row_sum, acc = empty_state(BLOCK_M, BLOCK_D)
            last_key = tl.full([BLOCK_M], 0, tl.int32) + length
            table = page_table_ptr + reader.to(tl.int64) * stride_table
            lo = begin + unit * BLOCK_N
            hi = tl.minimum(lo + take * BLOCK_N, length)
            # Only a last tile that is not full needs a mask. With SKIP_MASKS the full tiles get a loop of their own, without
            # masks: that pays where matrix products may take the time.
            edge = lo + (hi - lo) // BLOCK_N * BLOCK_N if SKIP_MASKS else lo
            if SKIP_MASKS:
                row_max, row_sum, acc = attend_tiles(
                    q, row_max, row_sum, acc, lo, edge, k_ptr, v_ptr, table, head * stride_head, last_key, 0, length,
                    0, scale, softcap, stride_page, stride_slot, token[:, None], head, h, q_idx, tensors,
                    D, BLOCK_D, PAGE, BLOCK_N, STAGES, False, False, HAS_SOFTCAP, PRECISION, HOOKS,
                )  # fmt: skip
            row_max, row_sum, acc = attend_tiles(
                q, row_max, row_sum, acc, edge, hi, k_ptr, v_ptr, table, head * stride_head, last_key, 0, length,
                0, scale, softcap, stride_page, stride_slot, token[:, None], head, h, q_idx, tensors,
                D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, False, HAS_SOFTCAP, PRECISION, HOOKS,
            )  # fmt: skip
            pair = token * GROUPS + head
            whole = whole_base + (level * rows * GROUPS + pair) * RATIO + m % RATIO
            at, first, parts = part_rows(number, position, unit, count, take, share, extra, 0, whole, m, BLOCK_M)
            store_state(partial_ptr, partial_sum_ptr, at, ok_m, row_max, row_sum, acc)
            if unit == 0:
                place_ptr = places_ptr + pair * PLACE + level * 2
                tl.store(place_ptr, first, mask=ok_m & (m % RATIO == 0))
                tl.store(place_ptr + 1, parts + tl.zeros_like(m), mask=ok_m & (m % RATIO == 0))
        position += take


def worth_gluon(
    q: Tensor, k_pages: Tensor, most_keys: int, queries: int, softcap: float | None, variant: CompiledVariant
) -> bool:
    """Whether the Gluon kernel can take the prefixes, and its tiles are full enough.

    `queries` is the number of packed query rows of a prefix group.
    """
    filled = queries / (triton.cdiv(queries, GLUON_ROWS) * GLUON_ROWS)
    one_group = queries * k_pages.shape[2] >= q.shape[0] * q.shape[1]
    least = GLUON_FILLED_BY_ONE if one_group else GLUON_FILLED
    if is_eight_bits(k_pages) or filled < least or q.shape[0] * most_keys < GLUON_KEYS or softcap is not None:
        return False
    from hf_fastattn.kernels.attention.hopper_prefixes import why_not_prefixes

    return why_not_prefixes(q, k_pages, variant) is None


def paged_decode_shared(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    group_starts: Tensor,
    prefix_lens: Tensor,
    *,
    max_group_rows: int,
    scale: float,
    softcap: float | None = None,
    workspace: Workspace | None = None,
    variant: CompiledVariant = PLAIN,
    hopper: bool = False,
    work_lists: WorkLists | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one new token a row over paged keys and values, where groups of rows share their first pages.

    The lengths and groups are read on the device; what a captured graph fixes is B, the number of groups and
    `max_group_rows`, which only chooses the tile: larger groups are computed as well.

    Args:
        q: `[B, H, D]` queries after RoPE.
        k_pages: `[N, P, G, D]` pages of keys, any strides but 1 in the last dimension; `v_pages` with the same.
        page_table: `[B, columns]` int32; rows of a group that have keys agree in the columns of its prefix.
        seq_lens: `[B]` int32, keys of each row after the append, its prefix included; 0 for a row without any.
        group_starts: `[groups + 1]` int32, not decreasing from 0: group i is the rows from `group_starts[i]` to before
            `group_starts[i + 1]`; groups may be empty, rows past the last one share nothing. Of prefixes within prefixes
            `[levels, groups + 1]`: a group with a prefix lies within one of each level above, or outside of all.
        prefix_lens: `[groups]` or `[levels, groups]` int32, tokens that a group's rows share, those of the levels above
            included, a multiple of P or 0; a row with keys has as many.
        max_group_rows: about how many rows the largest group has, known on the host.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.
        workspace: room for partial states, for one stream; a new one by default.
        variant: what attention does besides; without a window.
        hopper: take the Gluon kernel for the prefixes where it is quicker, with one more launch for its work list; see
            `backends.choose_backend`.
        work_lists: what earlier calls for the same lengths and groups have made, and this one adds to: the work of the Gluon
            kernel. To be emptied before lengths or groups change.

    Returns:
        Output `[B, H, D]` in q's dtype and LSE `[B, H]` fp32, natural logarithm; 0 and -inf for a row without keys.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_pages(q, k_pages, v_pages)
    rows, heads, dim = q.shape
    page, kv_heads, groups = k_pages.shape[1], k_pages.shape[2], prefix_lens.shape[-1]
    levels = prefix_lens.shape[0] if prefix_lens.ndim == 2 else 1
    if page_table.shape[0] != rows or seq_lens.shape[0] != rows:
        raise ValueError(
            f"page_table has {page_table.shape[0]} rows, seq_lens {seq_lens.shape[0]} and q {rows}; expected one a row"
        )
    if group_starts.shape != (*prefix_lens.shape[:-1], groups + 1) or not groups:
        raise ValueError(
            f"group_starts has shape {tuple(group_starts.shape)} and prefix_lens {tuple(prefix_lens.shape)}; expected one "
            "more in a level, and a group"
        )
    if not 1 <= levels <= MOST_LEVELS or not (group_starts.is_contiguous() and prefix_lens.is_contiguous()):
        raise ValueError(f"prefix_lens has {levels} levels; expected 1 to {MOST_LEVELS}, and both contiguous")
    if max_group_rows < 1:
        raise ValueError(f"max_group_rows={max_group_rows} must be positive")
    if variant.window is not None:
        raise ValueError(f"a variant with window={variant.window} has no shared prefixes; use paged_decode")
    if not rows:
        return torch.empty_like(q), torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    ratio, block_d, arch = heads // kv_heads, power_of_2(dim), arch_of(q.device)
    room = workspace or Workspace(q.device)
    queries = max_group_rows * ratio
    pairs = rows * kv_heads
    transformed = variant.transforms_keys
    gluon = hopper and worth_gluon(q, k_pages, page_table.shape[1] * page, queries, softcap, variant)
    tile = shared_prefix_tile(
        arch, element_bytes(q, k_pages), block_d, ratio if gluon else queries, pairs, room.processors, transformed
    )
    suffix = suffix_tile(arch, element_bytes(q, k_pages), block_d, pairs, room.processors, transformed)
    parts = parts_of_suffixes(suffix, pairs, room.processors)
    block_m = GLUON_ROWS if gluon else max(min(power_of_2(queries), tile.block_m), power_of_2(ratio), 16)
    programs = room.processors if gluon else max(tile.programs * room.processors, 2)
    suffix_base = 2 * programs * block_m
    whole_base = suffix_base + pairs * parts * power_of_2(ratio)
    states = max(triton.cdiv(whole_base + levels * rows * heads, 16), pairs)
    partial, partial_sum, arrived = room.split_kv(states, 16, block_d)
    if gluon:
        from hf_fastattn.kernels.attention.hopper_prefixes import hopper_prefixes

        places = hopper_prefixes(
            q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, scale=scale,
            programs=programs, whole_base=whole_base, work_lists={} if work_lists is None else work_lists,
        )  # fmt: skip
    else:
        places = torch.empty((pairs, PLACE.value), dtype=torch.int32, device=q.device)
        factor, cap = score_factors(scale, softcap, variant.hooks)
        overlap = overlaps_launches(arch)
        with on_device_of(q):
            prepared(prefixes_kernel)[(programs,)](
                q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, places,
                rows, groups, whole_base, factor, cap,
                q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
                variant.tensors,
                GROUPS=kv_heads, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
                BLOCK_B=max(power_of_2(rows), 16), BLOCK_P=max(power_of_2(groups * levels), 16),
                STEPS=max(power_of_2(groups), 16).bit_length() - 1, LEVELS=levels,
                BLOCK_M=block_m, BLOCK_N=tile.block_n, STAGES=stages_with(variant, tile.stages, block_m, tile.block_n),
                SKIP_MASKS=queries > 16 or pairs > room.processors, OVERLAP=overlap, HAS_SOFTCAP=softcap is not None,
                PRECISION=dot_precision(q.dtype), HOOKS=variant.hooks_for(q.dtype),
                num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
                **({"ptx_options": ASSEMBLER_OPTIONS} if arch == 90 else {}),
            )  # fmt: skip
    return suffixes_with_prefixes(
        q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, places, arrived,
        suffix_base=suffix_base, block_m=block_m, tile=suffix, parts=parts, scale=scale, softcap=softcap, variant=variant,
    )  # fmt: skip
