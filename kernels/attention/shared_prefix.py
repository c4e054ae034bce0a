"""Paged decode of rows that share prefixes: each prefix is read once for all of its rows, in two launches.

A prefix group is a run of neighbouring rows whose first tokens lie in the same pages. Of prefixes within prefixes (a system
prompt, below it questions, below each of them samples) every level has groups of its own, which begin where those above
them end. The queries of a group's rows and of the R heads of a key/value head are the rows of one matrix product over the
prefix (Ye et al., 2024, "Cascade Inference"; Juravsky et al., 2024, "Hydragen"); every row then reads its own suffix as in
`decode.py`. There are two work lists of tiles of keys: the prefixes, by (prefix group, kv head, query block), and the
suffixes, by (row, kv head). Each program computes its range of both from tensors on the device ("Stream-K", Osama et al.,
2023), so a captured graph follows lengths and groups that changed. The second launch, `prefix_merge.py`, merges the parts of
a row's prefixes and suffix. On Hopper the prefixes of large groups are a launch of their own, `hopper_prefixes.py`: there
matrix products take the time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import MANY_PAIRS, Tile, element_bytes, shared_prefix_tile, stages_with
from hf_fastattn.kernels.attention.eight_bit_tiles import attend_tiles
from hf_fastattn.kernels.attention.hooked import hooked_query
from hf_fastattn.kernels.attention.prefix_lists import (
    entry_at,
    equal_range,
    part_rows,
    prefix_entry,
    prefix_list,
    store_state,
    suffix_list,
    used_programs,
)
from hf_fastattn.kernels.attention.prefix_merge import MOST_LEVELS, PLACE, merge_prefixes
from hf_fastattn.kernels.attention.suffixes import SuffixTile, suffix_tile, suffixes_with_prefixes
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

# Up to this many (row, kv head) pairs per SM latency counts: one program per SM.
FEW_ROWS = 1
# BESIDE: some programs take prefixes, the others suffixes (fewest prologues). IN_TURN: all take prefixes, then all suffixes
# (best balance). BY_LENGTH: IN_TURN if prefixes have LONGER_PREFIXES times the tiles of suffixes, else BESIDE.
BESIDE, IN_TURN, BY_LENGTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LONGER_PREFIXES = tl.constexpr(2)
SPLIT_LAUNCHES = True
# The Gluon kernel's packed query rows a tile; it is quicker where that share of them is filled, and rows times the keys that
# a row may have are at least so many.
GLUON_ROWS, GLUON_FILLED, GLUON_KEYS = 128, 0.75, 160 * 1024


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

    A tile holds the queries of BLOCK_M // RATIO rows. The partial states: two blocks a program, from `whole_base` on those of
    prefixes that are not split.
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


@triton.jit(do_not_specialize=["rows", "prefix_groups", "suffix_base", "whole_base", "stride_table"])
def shared_prefix_kernel(
    q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
    partial_ptr, partial_sum_ptr, places_ptr,
    rows, prefix_groups, suffix_base, whole_base, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ORDER: tl.constexpr, OVERLAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
    PREFIXES: tl.constexpr,
):  # fmt: skip
    """One persistent program: a share of the tiles of prefixes (if PREFIXES), and one of the tiles of suffixes.

    A tile of a prefix holds the queries of BLOCK_M // RATIO rows. The partial states: two blocks a program of prefixes, from
    `suffix_base` on two a program of suffixes, from `whole_base` on unsplit prefixes and suffixes.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    row = tl.arange(0, BLOCK_B)
    is_row = row < rows
    suffix_first = 0
    if PREFIXES:
        is_group, prefix_upto, blocks = prefix_list(
            group_starts_ptr, prefix_lens_ptr, prefix_groups, BLOCK_P, BLOCK_N, BLOCK_M // RATIO, STEPS, LEVELS
        )  # fmt: skip
        triples = tl.maximum(tl.sum(blocks, 0) * GROUPS, 1)
        prefix_total = tl.max(prefix_upto, 0) * GROUPS
        suffix_total = 0
        if ORDER != IN_TURN:
            _, suffix_upto, _ = suffix_list(
                seq_lens_ptr, group_starts_ptr, prefix_lens_ptr, row, is_row, prefix_groups, STEPS, BLOCK_N, LEVELS
            )  # fmt: skip
            suffix_total = tl.max(suffix_upto, 0) * GROUPS
        prefix_programs, suffix_first = divide_programs(
            programs, triples, prefix_total, suffix_total, rows * GROUPS, ORDER
        )  # fmt: skip
        attend_prefixes(
            q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
            partial_ptr, partial_sum_ptr, places_ptr,
            pid, prefix_programs, prefix_total, prefix_upto, is_group, prefix_groups, row, rows, whole_base, scale, softcap,
            stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
            GROUPS, RATIO, D, BLOCK_D, PAGE, BLOCK_B, BLOCK_M, BLOCK_N, STAGES, ORDER != BESIDE, HAS_SOFTCAP, PRECISION,
            HOOKS, STEPS, LEVELS,
        )  # fmt: skip
    # Computed a second time: kept over the prefixes, it would take registers that their loop needs.
    starts, suffix_upto, shares = suffix_list(
        seq_lens_ptr, group_starts_ptr, prefix_lens_ptr, row, is_row, prefix_groups, STEPS, BLOCK_N, LEVELS
    )  # fmt: skip
    attend_suffixes(
        q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, partial_ptr, partial_sum_ptr, places_ptr,
        pid - suffix_first, programs - suffix_first, starts, suffix_upto, shares, row, is_row, rows,
        suffix_base, whole_base, scale, softcap, stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table,
        tensors, GROUPS, RATIO, D, BLOCK_D, PAGE, BLOCK_S, BLOCK_N, STAGES, HAS_SOFTCAP, PRECISION, HOOKS, LEVELS,
    )  # fmt: skip


@triton.jit
def divide_programs(programs, triples, prefix_total, suffix_total, pairs, ORDER: tl.constexpr):
    """How many programs work on prefixes, and the first one that works on suffixes.

    `triples` is the number of (prefix group, kv head, query block), `pairs` that of (row, kv head).
    """
    prefix_programs = used_programs(programs, triples)
    suffix_first = 0
    if ORDER != IN_TURN:
        # A suffix costs about one tile more than it has: its first tile is loaded with no work to hide the latency.
        suffix_cost = suffix_total + pairs
        divided = (prefix_total.to(tl.int64) * programs // (prefix_total + suffix_cost)).to(tl.int32)
        in_turn = False
        if ORDER == BY_LENGTH:
            in_turn = prefix_total >= LONGER_PREFIXES * suffix_cost
            divided = tl.where(divided >= triples, (divided + triples // 2) // triples * triples, divided)
        if not in_turn:
            prefix_programs = tl.where(prefix_total > 0, tl.minimum(tl.maximum(divided, 1), programs - 1), 0)
            suffix_first = prefix_programs
    return prefix_programs, suffix_first


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


@triton.jit
def attend_suffixes(
    q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, partial_ptr, partial_sum_ptr, places_ptr,
    number, programs, starts, upto, shares, row, is_row, rows, suffix_base, whole_base, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    HOOKS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Tiles of suffixes, the range of program `number` of `programs`: states of each row's queries over its own keys.

    `starts: [BLOCK_B]` says where each row's suffix begins, `upto: [BLOCK_B]` where it ends in the list, `shares: [BLOCK_B]`
    in which levels it has a prefix.
    """
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    position, end, share, extra = equal_range(number, programs, tl.max(upto, 0) * GROUPS)
    while position < end:
        b, tile = entry_at(position, upto, is_row, GROUPS)
        length = tl.load(seq_lens_ptr + b)
        start = tl.sum(tl.where(row == b, starts, 0), 0)
        count = tl.maximum((length - start + BLOCK_N - 1) // BLOCK_N, 1)
        head = tile // count
        unit = tile % count
        take = tl.minimum(count - unit, end - position)
        ok_s = s < RATIO  # [BLOCK_S]
        off_q = b.to(tl.int64) * stride_qt + (head * RATIO + s) * stride_qh  # [BLOCK_S]
        q = tl.load(q_ptr + off_q[:, None] + d[None, :], mask=ok_s[:, None] & (d < D)[None, :], other=0.0)
        h = head * RATIO + tl.minimum(s, RATIO - 1)
        q_idx = tl.zeros_like(s) + length - 1
        q = hooked_query(q, h, q_idx, tensors, HOOKS, q_ptr + off_q, ok_s, D, BLOCK_N)
        row_max, row_sum, acc = empty_state(BLOCK_S, BLOCK_D)
        last_key = tl.full([BLOCK_S], 0, tl.int32) + length
        table = page_table_ptr + b.to(tl.int64) * stride_table
        lo = start + unit * BLOCK_N
        row_max, row_sum, acc = attend_tiles(
            q, row_max, row_sum, acc, lo, tl.minimum(lo + take * BLOCK_N, length), k_ptr, v_ptr, table, head * stride_head,
            last_key, 0, length, 0, scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
            D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, False, HAS_SOFTCAP, PRECISION, HOOKS,
        )  # fmt: skip
        pair = b * GROUPS + head
        whole = whole_base + (LEVELS * rows * GROUPS + pair) * RATIO + s
        at, begin, parts = part_rows(number, position, unit, count, take, share, extra, suffix_base, whole, s, BLOCK_S)
        store_state(partial_ptr, partial_sum_ptr, at, ok_s, row_max, row_sum, acc)
        if unit == 0:
            place_ptr = places_ptr + pair * PLACE + LEVELS * 2
            tl.store(place_ptr + tl.zeros_like(s), begin, mask=s == 0)
            tl.store(place_ptr + 1, parts)
            tl.store(place_ptr + 2, tl.where(length > 0, tl.sum(tl.where(row == b, shares, 0), 0), 0))
        position += take


def order_of_work(pairs: int, queries: int, processors: int) -> tl.constexpr:
    """BESIDE, IN_TURN or BY_LENGTH for `pairs` (row, kv head) pairs, and `queries` packed query rows a prefix group."""
    if queries > 16 and pairs <= MANY_PAIRS * processors:
        return BY_LENGTH
    return BESIDE if pairs <= FEW_ROWS * processors else IN_TURN


def worth_gluon(
    q: Tensor, k_pages: Tensor, most_keys: int, queries: int, softcap: float | None, variant: CompiledVariant
) -> bool:
    """Whether the Gluon kernel can take the prefixes, and its tiles are full enough to be worth two more launches.

    `queries` is the number of packed query rows of a prefix group.
    """
    filled = queries / (triton.cdiv(queries, GLUON_ROWS) * GLUON_ROWS)
    if is_eight_bits(k_pages) or filled < GLUON_FILLED or q.shape[0] * most_keys < GLUON_KEYS or softcap is not None:
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
        hopper: take the Gluon kernel for the prefixes where it is quicker, in a launch of its own and one for its work
            list; see `backends.choose_backend`.
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
    block_s = max(power_of_2(ratio), 16)
    block_m = GLUON_ROWS if gluon else max(min(power_of_2(queries), tile.block_m), block_s)
    # Of one level, and of all of them.
    steps = max(power_of_2(groups), 16).bit_length() - 1
    block_p = max(power_of_2(groups * levels), 16)
    programs = max(tile.programs * room.processors, 2)
    prefix_programs = room.processors if gluon else programs
    factor, cap = score_factors(scale, softcap, variant.hooks)
    overlap = overlaps_launches(arch)
    if SPLIT_LAUNCHES:
        return _two_launches(
            q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, gluon=gluon, tile=tile, block_m=block_m,
            scale=scale, softcap=softcap, room=room, variant=variant, work_lists={} if work_lists is None else work_lists,
        )  # fmt: skip
    suffix_base = 2 * prefix_programs * block_m
    whole_base = suffix_base + 2 * programs * block_s
    partial, partial_sum, _ = room.split_kv(triton.cdiv(whole_base + (levels + 1) * rows * heads, 16), 16, block_d)
    if gluon:
        from hf_fastattn.kernels.attention.hopper_prefixes import hopper_prefixes

        places = hopper_prefixes(
            q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, scale=scale,
            programs=prefix_programs, whole_base=whole_base, work_lists={} if work_lists is None else work_lists,
        )  # fmt: skip
    else:
        places = torch.empty((rows * kv_heads, PLACE.value), dtype=torch.int32, device=q.device)
    with on_device_of(q):
        prepared(shared_prefix_kernel)[(programs,)](
            q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, places,
            rows, groups, suffix_base, whole_base, factor, cap,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            variant.tensors,
            GROUPS=kv_heads, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
            BLOCK_B=max(power_of_2(rows), 16), BLOCK_P=block_p, STEPS=steps, LEVELS=levels,
            BLOCK_M=block_m, BLOCK_S=block_s, BLOCK_N=tile.block_n,
            STAGES=stages_with(variant, tile.stages, max(block_m, block_s), tile.block_n),
            ORDER=order_of_work(pairs, queries, room.processors), OVERLAP=overlap, HAS_SOFTCAP=softcap is not None,
            PREFIXES=not gluon, PRECISION=dot_precision(q.dtype), HOOKS=variant.hooks_for(q.dtype),
            num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
            **({"ptx_options": ASSEMBLER_OPTIONS} if arch == 90 else {}),
        )  # fmt: skip
    return merge_prefixes(
        partial, partial_sum, places, seq_lens, (rows, heads, dim), q.dtype, block_m, block_s,
        levels=levels, overlap=overlap, variant=variant,
    )  # fmt: skip


def _two_launches(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, seq_lens: Tensor, group_starts: Tensor,
    prefix_lens: Tensor, *, gluon: bool, tile: Tile, block_m: int, scale: float, softcap: float | None, room: Workspace,
    variant: CompiledVariant, work_lists: WorkLists, suffix: SuffixTile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, heads, dim = q.shape
    page, kv_heads, groups = k_pages.shape[1], k_pages.shape[2], prefix_lens.shape[-1]
    levels = prefix_lens.shape[0] if prefix_lens.ndim == 2 else 1
    pairs, ratio, block_d, arch = rows * kv_heads, heads // kv_heads, power_of_2(dim), arch_of(q.device)
    suffix = suffix or suffix_tile(arch, element_bytes(q, k_pages), block_d, pairs, room.processors)
    programs = room.processors if gluon else max(tile.programs * room.processors, 2)
    suffix_base = 2 * programs * block_m
    whole_base = suffix_base + pairs * suffix.parts * power_of_2(ratio)
    partial, partial_sum, arrived = room.split_kv(
        max(triton.cdiv(whole_base + levels * rows * heads, 16), pairs), 16, block_d
    )  # fmt: skip
    if gluon:
        from hf_fastattn.kernels.attention.hopper_prefixes import hopper_prefixes

        places = hopper_prefixes(
            q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, scale=scale,
            programs=programs, whole_base=whole_base, work_lists=work_lists,
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
                SKIP_MASKS=pairs > FEW_ROWS * room.processors, OVERLAP=overlap, HAS_SOFTCAP=softcap is not None,
                PRECISION=dot_precision(q.dtype), HOOKS=variant.hooks_for(q.dtype),
                num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
                **({"ptx_options": ASSEMBLER_OPTIONS} if arch == 90 else {}),
            )  # fmt: skip
    return suffixes_with_prefixes(
        q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, places, arrived,
        suffix_base=suffix_base, block_m=block_m, tile=suffix, scale=scale, softcap=softcap, variant=variant,
    )  # fmt: skip
