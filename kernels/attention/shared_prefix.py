"""Paged decode of rows that share prefixes: each prefix is read once for all of its rows, in two launches.

Rows fall into groups of neighbours whose first tokens lie in the same pages. The queries of a group's rows and of the R
heads of a key/value head are the rows of one matrix product over the prefix (Ye et al., 2024, "Cascade Inference";
Juravsky et al., 2024, "Hydragen"); every row then reads its own suffix as in `decode.py`. Two lists of tiles of keys, that
of all (group, kv head, query block) and that of all (row, kv head), are cut into equal ranges by the programs themselves
from what is on the device ("Stream-K", Osama et al., 2023), so a captured graph follows lengths and groups that changed.
The second launch, `prefix_merge.py`, merges the parts of a row's prefix and suffix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import shared_prefix_tile
from hf_fastattn.kernels.attention.prefill import prefill_tiles
from hf_fastattn.kernels.attention.prefix_lists import entry_at, equal_range, part_rows, store_state, suffix_list
from hf_fastattn.kernels.attention.prefix_merge import PLACE, merge_prefixes
from hf_fastattn.kernels.attention.tile import score_factors
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

# Rows times kv heads for each multiprocessor up to which latency counts: a program has a multiprocessor to itself.
FEW_ROWS = 1
# The same from which on a prefix has so many rows that products take the time.
MANY_ROWS = 8
# Programs work on prefixes or on suffixes, so that both begin but once; or all on prefixes, then all on suffixes, so that
# all end at one time; or the device chooses by how many times more prefixes there are to read.
BESIDE, IN_TURN, BY_LENGTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LONGER_PREFIXES = tl.constexpr(2)


@triton.jit(do_not_specialize=["rows", "groups", "stride_table"])
def shared_prefix_kernel(
    q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
    partial_ptr, partial_sum_ptr, places_ptr,
    rows, groups, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ORDER: tl.constexpr, OVERLAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One persistent program: a share of the tiles of prefixes, and one of the tiles of suffixes.

    The tiles of a prefix take BLOCK_M // RATIO rows.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    TILE_ROWS: tl.constexpr = BLOCK_M // RATIO
    m = tl.arange(0, BLOCK_M)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    # The partial states: two blocks a program of prefixes, and of suffixes; then whole prefixes, and whole suffixes.
    suffix_base = 2 * programs * BLOCK_M
    whole_base = suffix_base + 2 * programs * BLOCK_S

    # ---- the list of prefixes: groups, in each the kv heads, in each the query blocks, in each the tiles of keys
    group = tl.arange(0, BLOCK_P)
    is_group = group < groups
    shared = tl.load(prefix_lens_ptr + group, mask=is_group, other=0)
    sharers = tl.load(group_starts_ptr + group + 1, mask=is_group, other=0)
    sharers -= tl.load(group_starts_ptr + group, mask=is_group, other=0)
    blocks = (sharers + TILE_ROWS - 1) // TILE_ROWS
    prefix_upto = tl.cumsum((shared + BLOCK_N - 1) // BLOCK_N * blocks, 0)
    prefix_total = tl.max(prefix_upto, 0) * GROUPS

    row = tl.arange(0, BLOCK_B)
    is_row = row < rows
    # As many programs for each query block, if that leaves few idle: those of a head then read the same keys in step.
    triples = tl.maximum(tl.sum(tl.where(shared > 0, blocks, 0), 0) * GROUPS, 1)
    alike = programs // triples * triples
    prefix_programs = tl.where(alike * 16 >= programs * 15, alike, programs)
    # The first program that works on suffixes.
    suffix_first = 0
    if ORDER != IN_TURN:
        _, suffix_upto = suffix_list(seq_lens_ptr, group_starts_ptr, prefix_lens_ptr, row, is_row, groups, STEPS, BLOCK_N)
        suffix_total = tl.max(suffix_upto, 0) * GROUPS
        # A suffix costs about one tile more than it has, for there is no work ahead of its first one.
        suffix_cost = suffix_total + rows * GROUPS
        divided = (prefix_total.to(tl.int64) * programs // (prefix_total + suffix_cost)).to(tl.int32)
        in_turn = False
        if ORDER == BY_LENGTH:
            in_turn = prefix_total >= LONGER_PREFIXES * suffix_cost
            divided = tl.where(divided >= triples, (divided + triples // 2) // triples * triples, divided)
        if not in_turn:
            prefix_programs = tl.where(prefix_total > 0, tl.minimum(tl.maximum(divided, 1), programs - 1), 0)
            suffix_first = prefix_programs

    position, end, share, extra = equal_range(pid, prefix_programs, prefix_total)
    while position < end:
        g, place = entry_at(position, prefix_upto, is_group, GROUPS)
        first_row = tl.load(group_starts_ptr + g)
        past_row = tl.load(group_starts_ptr + g + 1)
        length = tl.load(prefix_lens_ptr + g)
        count = (length + BLOCK_N - 1) // BLOCK_N
        unit = place % count
        take = tl.minimum(count - unit, end - position)
        block_count = (past_row - first_row + TILE_ROWS - 1) // TILE_ROWS
        head = place // count // block_count
        token = first_row + place // count % block_count * TILE_ROWS + m // RATIO
        # An inactive row may hold no pages: those of the first active one are read.
        active = tl.load(seq_lens_ptr + row, mask=(row >= first_row) & (row < past_row), other=0) > 0
        reader = tl.min(tl.where(active, row, BLOCK_B), 0)
        if reader < BLOCK_B:
            ok_m = (m < TILE_ROWS * RATIO) & (token < past_row)
            where = token.to(tl.int64) * stride_qt + (head * RATIO + m % RATIO) * stride_qh
            q = tl.load(q_ptr + where[:, None] + d[None, :], mask=ok_m[:, None] & (d < D)[None, :], other=0.0)
            row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            last_key = tl.full([BLOCK_M], 0, tl.int32) + length
            table = page_table_ptr + reader.to(tl.int64) * stride_table
            lo = unit * BLOCK_N
            hi = tl.minimum(lo + take * BLOCK_N, length)
            # Where products may take the time, only a last tile that is not full pays for a mask.
            edge = lo if ORDER == BESIDE else hi // BLOCK_N * BLOCK_N
            if ORDER != BESIDE:
                row_max, row_sum, acc = prefill_tiles(
                    q, row_max, row_sum, acc, lo, edge, k_ptr, v_ptr, table, head * stride_head, last_key, 0, length,
                    0, scale, softcap, stride_page, stride_slot,
                    D, BLOCK_D, PAGE, BLOCK_N, STAGES, False, False, HAS_SOFTCAP, PRECISION,
                )  # fmt: skip
            row_max, row_sum, acc = prefill_tiles(
                q, row_max, row_sum, acc, edge, hi, k_ptr, v_ptr, table, head * stride_head, last_key, 0, length,
                0, scale, softcap, stride_page, stride_slot,
                D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, False, HAS_SOFTCAP, PRECISION,
            )  # fmt: skip
            pair = token * GROUPS + head
            at, begin, parts = part_rows(
                pid, position, unit, count, take, share, extra, 0, whole_base + pair * RATIO + m % RATIO, m, BLOCK_M
            )
            store_state(partial_ptr, partial_sum_ptr, at, ok_m, row_max, row_sum, acc)
            if unit == 0:
                to = places_ptr + pair * PLACE
                tl.store(to, begin, mask=ok_m & (m % RATIO == 0))
                tl.store(to + 1, parts + tl.zeros_like(m), mask=ok_m & (m % RATIO == 0))
        position += take

    # Worked out once more: registers are few while prefixes are read.
    starts, suffix_upto = suffix_list(seq_lens_ptr, group_starts_ptr, prefix_lens_ptr, row, is_row, groups, STEPS, BLOCK_N)
    suffix_total = tl.max(suffix_upto, 0) * GROUPS
    suffix_number = pid - suffix_first
    position, end, share, extra = equal_range(suffix_number, programs - suffix_first, suffix_total)
    while position < end:
        b, place = entry_at(position, suffix_upto, is_row, GROUPS)
        length = tl.load(seq_lens_ptr + b)
        start = tl.sum(tl.where(row == b, starts, 0), 0)
        count = tl.maximum((length - start + BLOCK_N - 1) // BLOCK_N, 1)
        head = place // count
        unit = place % count
        take = tl.minimum(count - unit, end - position)
        ok_s = s < RATIO
        where = b.to(tl.int64) * stride_qt + (head * RATIO + s) * stride_qh
        q = tl.load(q_ptr + where[:, None] + d[None, :], mask=ok_s[:, None] & (d < D)[None, :], other=0.0)
        row_max = tl.full([BLOCK_S], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        last_key = tl.full([BLOCK_S], 0, tl.int32) + length
        table = page_table_ptr + b.to(tl.int64) * stride_table
        lo = start + unit * BLOCK_N
        row_max, row_sum, acc = prefill_tiles(
            q, row_max, row_sum, acc, lo, tl.minimum(lo + take * BLOCK_N, length), k_ptr, v_ptr, table, head * stride_head,
            last_key, 0, length, 0, scale, softcap, stride_page, stride_slot,
            D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, False, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        pair = b * GROUPS + head
        whole = whole_base + (rows * GROUPS + pair) * RATIO + s
        at, begin, parts = part_rows(
            suffix_number, position, unit, count, take, share, extra, suffix_base, whole, s, BLOCK_S
        )
        store_state(partial_ptr, partial_sum_ptr, at, ok_s, row_max, row_sum, acc)
        if unit == 0:
            to = places_ptr + pair * PLACE
            tl.store(to + 2 + tl.zeros_like(s), begin, mask=s == 0)
            tl.store(to + 3, parts)
            tl.store(to + 4, ((start > 0) & (length > 0)).to(tl.int32))
        position += take


def order_of_work(pairs: int, queries: int, processors: int) -> tl.constexpr:
    """BESIDE, IN_TURN or BY_LENGTH for so many (row, kv head) pairs, and packed query rows a (group, kv head) pair."""
    if queries > 16 and pairs <= MANY_ROWS * processors:
        return BY_LENGTH
    return BESIDE if pairs <= FEW_ROWS * processors else IN_TURN


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
            `group_starts[i + 1]`; groups may be empty, rows past the last one share nothing.
        prefix_lens: `[groups]` int32, tokens that a group's rows share, a multiple of P or 0; a row with keys has as many.
        max_group_rows: about how many rows the largest group has, known on the host.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.
        workspace: room for partial states, for one stream; a new one by default.

    Returns:
        Output `[B, H, D]` in q's dtype and LSE `[B, H]` fp32, natural logarithm; 0 and -inf for a row without keys.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_pages(q, k_pages, v_pages)
    rows, heads, dim = q.shape
    page, kv_heads, groups = k_pages.shape[1], k_pages.shape[2], prefix_lens.shape[0]
    if page_table.shape[0] != rows or seq_lens.shape[0] != rows:
        raise ValueError(
            f"page_table has {page_table.shape[0]} rows, seq_lens {seq_lens.shape[0]} and q {rows}; expected one a row"
        )
    if group_starts.shape[0] != groups + 1 or not groups:
        raise ValueError(
            f"group_starts has {group_starts.shape[0]} entries and prefix_lens {groups}; expected one more, and a group"
        )
    if max_group_rows < 1:
        raise ValueError(f"max_group_rows={max_group_rows} must be positive")
    if not rows:
        return torch.empty_like(q), torch.empty(rows, heads, dtype=torch.float32, device=q.device)
    ratio, block_d, arch = heads // kv_heads, power_of_2(dim), arch_of(q.device)
    room = workspace or Workspace(q.device)
    queries = max_group_rows * ratio
    pairs = rows * kv_heads
    tile = shared_prefix_tile(arch, q.element_size(), block_d, queries, pairs <= FEW_ROWS * room.processors)
    block_s = max(power_of_2(ratio), 16)
    block_m = max(min(power_of_2(queries), tile.block_m), block_s)
    block_p = max(power_of_2(groups), 16)
    programs = max(tile.programs * room.processors, 2)
    factor, cap = score_factors(scale, softcap)
    overlap = overlaps_launches(arch)
    states = 2 * programs * (block_m + block_s) + 2 * rows * heads
    partial, partial_sum, _ = room.split_kv(triton.cdiv(states, 16), 16, block_d)
    places = torch.empty((rows * kv_heads, PLACE.value), dtype=torch.int32, device=q.device)
    with on_device_of(q):
        shared_prefix_kernel[(programs,)](
            q, k_pages, v_pages, page_table, seq_lens, group_starts, prefix_lens, partial, partial_sum, places,
            rows, groups, factor, cap,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            GROUPS=kv_heads, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
            BLOCK_B=max(power_of_2(rows), 16), BLOCK_P=block_p, STEPS=block_p.bit_length() - 1,
            BLOCK_M=block_m, BLOCK_S=block_s, BLOCK_N=tile.block_n, STAGES=tile.stages,
            ORDER=order_of_work(pairs, queries, room.processors), OVERLAP=overlap, HAS_SOFTCAP=softcap is not None,
            PRECISION=dot_precision(q.dtype), num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
            **({"ptx_options": ASSEMBLER_OPTIONS} if arch == 90 else {}),
        )  # fmt: skip
    return merge_prefixes(partial, partial_sum, places, (rows, heads, dim), q.dtype, block_m, block_s, overlap=overlap)
