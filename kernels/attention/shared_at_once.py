"""Paged decode of rows that share prefixes in one launch: whoever computes a row's suffix merges the prefix with it.

The first programs take prefixes, all others suffixes, as in `shared_prefix.py`; both kinds are on a multiprocessor at the
same time, so that the loads of one hide the latency of the other. A prefix program counts the tiles that it has done. The
program that has a row's suffix (of a split one the last to arrive) waits until the tiles of its prefix are done, and merges.
It waits for programs of lower number only, which are started before it, so that the launch ends however few run at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import Tile, stages_with
from hf_fastattn.kernels.attention.eight_bit_tiles import attend_tiles
from hf_fastattn.kernels.attention.hooked import hooked_query
from hf_fastattn.kernels.attention.prefix_lists import (
    entry_at,
    equal_range,
    group_of_rows,
    prefix_list,
    store_state,
    used_programs,
)
from hf_fastattn.kernels.attention.prefix_merge import PLACE
from hf_fastattn.kernels.attention.shared_prefix import attend_prefixes
from hf_fastattn.kernels.attention.shares import program_of
from hf_fastattn.kernels.attention.tile import attention_end, empty_state, merge_step, score_factors, store_output
from hf_fastattn.kernels.launch import ASSEMBLER_OPTIONS, arch_of, dot_precision, on_device_of, overlaps_launches, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import CompiledVariant

# In a counter of a query block of a prefix: tiles that are done, and above them, in units of READ, pairs that have read it.
READ = tl.constexpr(1 << 20)
# Partial states whose loads are in flight together.
MERGE_PARTS = 4
MAXNREG = None


@dataclass(frozen=True)
class States:
    """Room for partial states, and who computes them.

    Attributes:
        partial: `[states, BLOCK_D]` fp32, sums of weighted values; `sums: [states, 2]` fp32, maximum (base 2) and sum.
        counters: int32, zero, two for each (row, kv head).
        prefix_programs: two blocks of states each come first, `suffix_programs` from `suffix_base` on; from `whole_base` on
            those of prefixes that are not split.
        places: of prefixes, if the launch ahead has computed them; see `prefix_merge.PLACE`.
    """

    partial: Tensor
    sums: Tensor
    counters: Tensor
    prefix_programs: int
    suffix_programs: int
    suffix_base: int
    whole_base: int
    places: Tensor | None = None


@triton.jit(do_not_specialize=["rows", "prefix_groups", "prefix_programs", "suffix_base", "whole_base", "stride_table"])
def shared_at_once_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
    partial_ptr, partial_sum_ptr, places_ptr, counters_ptr,
    rows, prefix_groups, prefix_programs, suffix_base, whole_base, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MERGE_PARTS: tl.constexpr,
    OVERLAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr, PREFIXES: tl.constexpr,
):  # fmt: skip
    """One program: a share of the tiles of prefixes if its number is below `prefix_programs`, else one of suffixes.

    Without PREFIXES the launch ahead has left their states. `counters_ptr` are two for each (row, kv head), zero between
    launches: arrivals of a suffix's parts, then tiles of prefixes.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    row = tl.arange(0, BLOCK_B)
    done_ptr = counters_ptr + rows * GROUPS
    if PREFIXES and pid < prefix_programs:
        is_group, upto, blocks = prefix_list(
            group_starts_ptr, prefix_lens_ptr, prefix_groups, BLOCK_P, BLOCK_N, BLOCK_M // RATIO, STEPS, 1
        )  # fmt: skip
        used = used_programs(prefix_programs, tl.maximum(tl.sum(blocks, 0) * GROUPS, 1))
        attend_prefixes(
            q_ptr, k_ptr, v_ptr, page_table_ptr, seq_lens_ptr, group_starts_ptr, prefix_lens_ptr,
            partial_ptr, partial_sum_ptr, places_ptr,
            pid, used, tl.max(upto, 0) * GROUPS, upto, is_group, prefix_groups, row, rows, whole_base, scale, softcap,
            stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
            GROUPS, RATIO, D, BLOCK_D, PAGE, BLOCK_B, BLOCK_M, BLOCK_N, STAGES, False, HAS_SOFTCAP, PRECISION,
            HOOKS, STEPS, 1, done_ptr,
        )  # fmt: skip
    else:
        is_row = row < rows
        group, firsts, stops = group_of_rows(group_starts_ptr, row, is_row, prefix_groups, STEPS)
        starts = tl.load(prefix_lens_ptr + group, mask=is_row & (row < stops), other=0)
        lengths = tl.load(seq_lens_ptr + row, mask=is_row, other=0)
        tiles = tl.maximum((lengths - starts + BLOCK_N - 1) // BLOCK_N, 1)
        suffixes_to_outputs(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, seq_lens_ptr, partial_ptr, partial_sum_ptr, places_ptr,
            counters_ptr, done_ptr,
            pid - prefix_programs, tl.num_programs(0) - prefix_programs, starts, firsts, tl.minimum(stops, rows),
            tl.cumsum(tl.where(is_row, tiles, 0), 0), row, is_row, suffix_base, scale, softcap,
            stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
            GROUPS, RATIO, D, BLOCK_D, PAGE, BLOCK_M, BLOCK_S, BLOCK_N, STAGES, MERGE_PARTS, HAS_SOFTCAP, PRECISION, HOOKS,
            PREFIXES,
        )  # fmt: skip


@triton.jit
def suffixes_to_outputs(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, seq_lens_ptr, partial_ptr, partial_sum_ptr, places_ptr,
    arrived_ptr, done_ptr, number, programs, starts, firsts, stops, upto, row, is_row, suffix_base, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, MERGE_PARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Tiles of suffixes, the range of program `number` of `programs`, and the outputs of the rows that it ends.

    `starts`, `firsts`, `stops: [BLOCK_B]` say where each row's suffix begins, and the rows of its prefix group; `upto:
    [BLOCK_B]` where it ends in the list.
    """
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    ok_s = s < RATIO  # [BLOCK_S]
    position, end, share, extra = equal_range(number, programs, tl.max(upto, 0) * GROUPS)
    while position < end:
        b, tile = entry_at(position, upto, is_row, GROUPS)
        length = tl.load(seq_lens_ptr + b)
        start = tl.sum(tl.where(row == b, starts, 0), 0)
        count = tl.maximum((length - start + BLOCK_N - 1) // BLOCK_N, 1)
        head = tile // count
        unit = tile % count
        take = tl.minimum(count - unit, end - position)
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
        parts = 1
        ends = True
        if take < count:
            first = program_of(position - unit, share, extra)
            parts = program_of(position - unit + count - 1, share, extra) - first + 1
            # A split item is the last item of its first program and the first item of all others.
            at = suffix_base + (number * 2 + (number == first).to(tl.int32)) * BLOCK_S + s
            store_state(partial_ptr, partial_sum_ptr, at, ok_s, row_max, row_sum, acc)
            tl.debug_barrier()
            ends = tl.atomic_add(arrived_ptr + pair, 1, sem="acq_rel", scope="gpu") == parts - 1
            if ends:
                tl.store(arrived_ptr + pair, 0)
                row_max, row_sum, acc = empty_state(BLOCK_S, BLOCK_D)
                row_max, row_sum, acc = with_parts(
                    row_max, row_sum, acc, partial_ptr, partial_sum_ptr, suffix_base + (first * 2 + 1) * BLOCK_S, parts, s,
                    ok_s, BLOCK_S, MERGE_PARTS,
                )  # fmt: skip
        if ends:
            place_ptr = places_ptr + pair * PLACE
            if WAIT and start > 0:
                first_row = tl.sum(tl.where(row == b, firsts, 0), 0)
                past_row = tl.sum(tl.where(row == b, stops, 0), 0)
                tile_row, readers = query_block(b, first_row, past_row, BLOCK_M // RATIO)
                wait_for_prefix(done_ptr + tile_row * GROUPS + head, (start + BLOCK_N - 1) // BLOCK_N, readers)
            # A row without keys has no prefix either, whatever its group has.
            has_prefix = (start > 0) & (length > 0)
            prefix_at = tl.load(place_ptr, mask=has_prefix, other=0, cache_modifier=".cg")
            prefix_parts = tl.load(place_ptr + 1, mask=has_prefix, other=0, cache_modifier=".cg")
            row_max, row_sum, acc = with_parts(
                row_max, row_sum, acc, partial_ptr, partial_sum_ptr, prefix_at, prefix_parts, s, ok_s, BLOCK_M, MERGE_PARTS
            )
            out, lse = attention_end(row_max, row_sum, acc, h, q_idx, tensors, HOOKS)
            store_output(out_ptr, lse_ptr, pair.to(tl.int64) * RATIO + s, ok_s, out, lse, D)
        position += take


@triton.jit
def query_block(b, first_row, past_row, TILE_ROWS: tl.constexpr):
    """The first row of the query block that row `b` of a prefix group is in, and how many rows it has."""
    tile_row = first_row + (b - first_row) // TILE_ROWS * TILE_ROWS
    return tile_row, tl.minimum(past_row - tile_row, TILE_ROWS)


@triton.jit
def wait_for_prefix(counter_ptr, tiles, readers):
    """Wait until all `tiles` of a query block are done. The last of its `readers` has the counter at zero again."""
    done = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while done % READ < tiles:
        done = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    if tl.atomic_add(counter_ptr, READ, sem="relaxed", scope="gpu") == (readers - 1) * READ + tiles:
        tl.store(counter_ptr, 0)


@triton.jit
def with_parts(
    row_max, row_sum, acc, partial_ptr, partial_sum_ptr, first, parts, s, ok_s,
    BLOCK: tl.constexpr, MERGE_PARTS: tl.constexpr,
):  # fmt: skip
    """A state merged with `parts` more, in order, of which the first begins in row `first` of the partial states."""
    d = tl.arange(0, acc.shape[1])
    for number in range(0, parts, MERGE_PARTS):
        # Unrolled: the loads of MERGE_PARTS parts are in flight together.
        for u in tl.static_range(MERGE_PARTS):
            i = number + u
            ok = ok_s & (i < parts)
            # A split item starts in the second block of its first program, and goes on in the first block of the others.
            at = first + tl.maximum(2 * i - 1, 0) * BLOCK + s  # [BLOCK_S]
            # .cg bypasses the L1 cache, which may hold values from before another program wrote.
            part_max = tl.load(partial_sum_ptr + at * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
            part_sum = tl.load(partial_sum_ptr + at * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
            off_part = at[:, None] * acc.shape[1] + d[None, :]  # [BLOCK_S, BLOCK_D]
            part_acc = tl.load(partial_ptr + off_part, mask=ok[:, None], other=0.0, cache_modifier=".cg")
            row_max, row_sum, acc = merge_step(part_max, part_sum, part_acc, row_max, row_sum, acc)
    return row_max, row_sum, acc


def decode_at_once(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    group_starts: Tensor,
    prefix_lens: Tensor,
    *,
    states: States,
    block_m: int,
    block_s: int,
    tile: Tile,
    scale: float,
    softcap: float | None,
    variant: CompiledVariant,
) -> tuple[Tensor, Tensor]:
    """`shared_prefix.paged_decode_shared`, which has checked the arguments, of one level of prefixes.

    Args:
        group_starts: `[groups + 1]` or `[1, groups + 1]` int32; `prefix_lens` `[groups]` or `[1, groups]`.
        states: room for partial states, and who computes them.
        block_m: packed query rows of a tile of a prefix; `block_s` of a suffix.
        tile: launch configuration.
    """
    rows, heads, dim = q.shape
    page, kv_heads, groups = k_pages.shape[1], k_pages.shape[2], prefix_lens.shape[-1]
    factor, cap = score_factors(scale, softcap, variant.hooks)
    places = states.places
    if places is None:
        places = torch.empty((rows * kv_heads, PLACE.value), dtype=torch.int32, device=q.device)
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    arch = arch_of(q.device)
    overlap = overlaps_launches(arch)
    prefix_programs = states.prefix_programs if states.places is None else 0
    with on_device_of(q):
        prepared(shared_at_once_kernel)[(prefix_programs + states.suffix_programs,)](
            q, k_pages, v_pages, out, lse, page_table, seq_lens, group_starts, prefix_lens,
            states.partial, states.sums, places, states.counters,
            rows, groups, prefix_programs, states.suffix_base, states.whole_base, factor, cap,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            variant.tensors,
            GROUPS=kv_heads, RATIO=heads // kv_heads, D=dim, BLOCK_D=power_of_2(dim), PAGE=page,
            BLOCK_B=max(power_of_2(rows), 16), BLOCK_P=max(power_of_2(groups), 16),
            STEPS=max(power_of_2(groups), 16).bit_length() - 1,
            BLOCK_M=block_m, BLOCK_S=block_s, BLOCK_N=tile.block_n,
            STAGES=stages_with(variant, tile.stages, max(block_m, block_s), tile.block_n), MERGE_PARTS=MERGE_PARTS,
            OVERLAP=overlap, HAS_SOFTCAP=softcap is not None, PREFIXES=states.places is None,
            PRECISION=dot_precision(q.dtype), HOOKS=variant.hooks_for(q.dtype),
            num_warps=tile.warps, maxnreg=MAXNREG, **({"launch_pdl": True} if overlap else {}),
            **({"ptx_options": ASSEMBLER_OPTIONS} if arch == 90 else {}),
        )  # fmt: skip
    return out, lse
