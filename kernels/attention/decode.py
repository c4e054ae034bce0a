"""Paged decode and short appends: split-KV attention that plans its own split, in one launch.

The R query heads of a key/value head (and the new tokens of a row) are packed into one matrix-unit tile. For each kv head
the K/V tiles of all items (row, query block) form one flat list. Each program computes its own range of the list from
`seq_lens`, so ragged lengths are balanced, nothing is planned on the host or by another launch, and a captured graph
follows lengths that changed. There are two splits:
- Stream-K (Osama et al., 2023): equal ranges, cut anywhere. Each item counts for ITEM_KEYS keys more than it has, the
  fixed cost of its prologue and epilogue.
- Even, for rows of similar length: every item is cut into the same number of parts ("Flash-Decoding", Dao et al., 2023),
  or every program takes the same number of whole items.
A program leaves at most two partial states, of its first and its last item. The last program to arrive at a split item
merges the parts by LSE in fixed order, so results are bitwise repeatable. A single row, or a few of 8-bit
keys, of queries in 16 bits, goes to `decode_row.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import Tile, element_bytes, split_kv_tile, stages_with
from hf_fastattn.kernels.attention.decode_list import find_item, part_numbers, plan_split
from hf_fastattn.kernels.attention.decode_row import MOST_ROWS_OF_8_BITS, decode_row
from hf_fastattn.kernels.attention.eight_bit_tiles import attend_tiles
from hf_fastattn.kernels.attention.hooked import hooked_query
from hf_fastattn.kernels.attention.new_token import NewToken, check_new_token, takes_new_token
from hf_fastattn.kernels.attention.tile import (
    attention_end,
    empty_state,
    merge_step,
    score_factors,
    store_output,
)
from hf_fastattn.kernels.attention.visited import Visited, check_visited
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.launch import (
    arch_of,
    check_pages,
    matrix_precision,
    on_device_of,
    overlaps_launches,
    power_of_2,
)
from hf_fastattn.kernels.page_formats import is_eight_bits
from hf_fastattn.kernels.relaunch import Launch
from hf_fastattn.kernels.variants.hooks import NO_HOOKS, PLAIN, CompiledVariant

# Keys of a part in batch-invariant mode: a multiple of every tile, few enough that one long row still fills the GPU.
INVARIANT_KEYS = 1024
# Fp32 elements of partial states that a merging program has in flight, in registers.
MERGE_ELEMENTS = 4096
# As MERGE_ELEMENTS, if items may be cut into MANY_PARTS or more parts, so that merging takes much of the time.
MERGE_ELEMENTS_MANY, MANY_PARTS = 16384, 8
# Query rows of a part that are merged in the time of reading one key.
MERGED_ROWS = 2
# Fixed cost of an item (prologue and epilogue), as the number of keys that are read in the same time.
ITEM_KEYS = 192
# Largest imbalance, in keys, that an even split may cost; above it the work list is cut anywhere (stream-K).
UNEVEN_KEYS = 384


@triton.jit(do_not_specialize=["rows", "window", "stride_table"])
def split_kv_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, cu_seqlens_ptr, seq_lens_ptr,
    partial_ptr, partial_sum_ptr, arrived_ptr,
    rows, window, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors, visited,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    ITEM_KEYS: tl.constexpr, UNEVEN_KEYS: tl.constexpr, MOST_WHOLE: tl.constexpr, MERGED: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE_PARTS: tl.constexpr, OVERLAP: tl.constexpr, ONE_BLOCK: tl.constexpr,
    LISTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, HOOKS: tl.constexpr,
):  # fmt: skip
    """One persistent program: an equal range of the flat list of units, each UNIT tiles of keys, for one kv head.

    `cu_seqlens_ptr` is None in decode. With UNIT = 1 a program treats neighbouring units as one. With more (batch-invariant
    mode) each unit is a part of its own, so that a row is added up in the same order whatever the other rows. `visited` is a
    `Visited` of LISTS lists a row, or None.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    # Heads are innermost: neighbouring programs read the same pages, for different heads.
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    counts_ptr = None
    if visited is not None:
        counts_ptr, tiles_ptr, columns = visited
        counts_ptr += (head * 2 if LISTS > 1 else 0) + 1
    upto, fill, spare, position, end, share, extra = plan_split(
        seq_lens_ptr, cu_seqlens_ptr, rows, window, chunk, tl.num_programs(1),
        RATIO, BLOCK_B, BLOCK_M, BLOCK_N, UNIT, ITEM_KEYS, UNEVEN_KEYS, MOST_WHOLE, MERGED, ONE_BLOCK, HAS_WINDOW,
        counts_ptr, LISTS,
    )  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    while position < end:
        b, length, first_token, new, lowest, first_unit, count, filled, block, unit = find_item(
            position, upto, fill, spare, seq_lens_ptr, cu_seqlens_ptr, window, UNIT, BLOCK_N, HAS_WINDOW, counts_ptr, LISTS
        )
        take = tl.minimum(count - unit, end - position) if UNIT == 1 else 1
        base = position - unit
        position += take
        if unit + take == count:
            position += filled - count
        first_query = 0 if ONE_BLOCK else block * BLOCK_M
        query = first_query + m  # [BLOCK_M]
        token = query // RATIO
        ok_m = token < new
        off_q = (first_token + token).to(tl.int64) * stride_qt + (head * RATIO + query % RATIO) * stride_qh
        q = tl.load(q_ptr + off_q[:, None] + d[None, :], mask=ok_m[:, None] & (d < D)[None, :], other=0.0)
        last_key = length - new + token
        q_idx = last_key
        if tensors is not None:
            # Rows past the last query take its position: a variant's tables are read for no others.
            q_idx = length - new + tl.minimum(token, new - 1)
        h = head * RATIO + query % RATIO
        q = hooked_query(q, h, q_idx, tensors, HOOKS, q_ptr + off_q, ok_m, D, BLOCK_N)
        row_max, row_sum, acc = empty_state(BLOCK_M, BLOCK_D)
        table = page_table_ptr + b.to(tl.int64) * stride_table
        listed = None
        if visited is not None:
            # The entries of the row's list, which ends with its memory.
            listed = tiles_ptr + (b * LISTS + (head if LISTS > 1 else 0)).to(tl.int64) * columns
            start = columns - tl.load(counts_ptr + b * LISTS * 2) + unit * UNIT
            stop = tl.minimum(start + take * UNIT, columns)
        else:
            start = (first_unit + unit) * UNIT * BLOCK_N
            stop = tl.minimum(start + take * UNIT * BLOCK_N, length)
            if HAS_WINDOW:
                start = tl.maximum(start, lowest // BLOCK_N * BLOCK_N)
        row_max, row_sum, acc = attend_tiles(
            q, row_max, row_sum, acc, start, stop, k_ptr, v_ptr, table, head * stride_head, last_key, lowest, length,
            window, scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
            D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HOOKS, listed,
            True, visited is not None,
        )  # fmt: skip
        if take == count:
            out, lse = attention_end(row_max, row_sum, acc, h, q_idx, tensors, HOOKS)
            out_row = (first_token + token).to(tl.int64) * (GROUPS * RATIO) + head * RATIO + query % RATIO
            store_output(out_ptr, lse_ptr, out_row, ok_m, out, lse, D)
        else:
            first, last, part = part_numbers(base, unit, count, chunk, share, extra, UNIT)
            store_part(partial_ptr, partial_sum_ptr, part * GROUPS + head, ok_m, row_max, row_sum, acc)
            # Every thread has stored its share of the part before one of them counts it.
            tl.debug_barrier()
            counter_ptr = arrived_ptr + first * GROUPS + head
            arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            if arrived == last - first:
                tl.store(counter_ptr, 0)
                merge_parts(
                    partial_ptr, partial_sum_ptr, out_ptr, lse_ptr, first, last, first_token, new, head, first_query,
                    length, tensors, GROUPS, RATIO, D, BLOCK_D, BLOCK_M, UNIT, MERGE_ROWS, MERGE_PARTS, HOOKS,
                )  # fmt: skip


@triton.jit
def store_part(partial_ptr, partial_sum_ptr, part, ok_m, row_max, row_sum, acc):
    """A state to `partial_ptr: [parts, BLOCK_M, BLOCK_D]` and `partial_sum_ptr: [parts, BLOCK_M, 2]`.

    Maximum and sum are kept apart: their logarithm in one number would round the weight of the part.
    """
    d = tl.arange(0, acc.shape[1])
    at = part * acc.shape[0] + tl.arange(0, acc.shape[0])  # [BLOCK_M]
    off_part = at[:, None] * acc.shape[1] + d[None, :]  # [BLOCK_M, BLOCK_D]
    tl.store(partial_ptr + off_part, acc, mask=ok_m[:, None])
    tl.store(partial_sum_ptr + at * 2, row_max)
    tl.store(partial_sum_ptr + at * 2 + 1, row_sum)


@triton.jit
def merge_parts(
    partial_ptr, partial_sum_ptr, out_ptr, lse_ptr, first, last, first_token, new, head, first_query, length, tensors,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_PARTS: tl.constexpr, HOOKS: tl.constexpr,
):  # fmt: skip
    """Merge the parts `first` to `last`, in order, for MERGE_ROWS query rows at a time."""
    d = tl.arange(0, BLOCK_D)
    for row in range(0, BLOCK_M, MERGE_ROWS):
        m = row + tl.arange(0, MERGE_ROWS)
        query = first_query + m
        ok_m = query // RATIO < new
        row_max, row_sum, acc = empty_state(MERGE_ROWS, BLOCK_D)
        for number in range(first, last + 1, MERGE_PARTS):
            # Unrolled, and without a reduction over threads: the loads of MERGE_PARTS parts are in flight together.
            for u in tl.static_range(MERGE_PARTS):
                ok = query // RATIO < tl.where(number + u <= last, new, 0)
                part = number + u
                # The place that `part_numbers` gave it.
                if UNIT == 1:
                    part = part * 2 + (part == first).to(tl.int32)
                at = (part * GROUPS + head) * BLOCK_M + m  # [MERGE_ROWS]
                # .cg bypasses the L1 cache, which may hold values from before another program wrote.
                part_max = tl.load(partial_sum_ptr + at * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
                part_sum = tl.load(partial_sum_ptr + at * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
                off_part = at[:, None] * BLOCK_D + d[None, :]  # [MERGE_ROWS, BLOCK_D]
                part_acc = tl.load(partial_ptr + off_part, mask=ok[:, None], other=0.0, cache_modifier=".cg")
                row_max, row_sum, acc = merge_step(part_max, part_sum, part_acc, row_max, row_sum, acc)
        h = head * RATIO + query % RATIO
        out, lse = attention_end(row_max, row_sum, acc, h, length - new + query // RATIO, tensors, HOOKS)
        out_row = (first_token + query // RATIO).to(tl.int64) * (GROUPS * RATIO) + head * RATIO + query % RATIO
        store_output(out_ptr, lse_ptr, out_row, ok_m, out, lse, D)


def tile_of_decode(
    q: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    max_query_len: int,
    processors: int,
    batch_invariant: bool,
    variant: CompiledVariant,
) -> Tile:
    """The tile that a launch takes for these shapes."""
    rows, keys = page_table.shape[0], page_table.shape[1] * k_pages.shape[1]
    heads, groups = q.shape[1], k_pages.shape[2]
    pairs = None if batch_invariant else rows * groups
    queries, rotated = max_query_len * heads // groups, variant.hooks.rotated > 0
    arch, block_d = arch_of(q.device), power_of_2(q.shape[2])
    itemsize, hooked = element_bytes(q, k_pages), variant.hooks != NO_HOOKS
    return split_kv_tile(
        arch, itemsize, block_d, queries, pairs, processors, rotated, hooked, keys, variant.transforms_keys
    )  # fmt: skip


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_query_len: int = 1,
    workspace: Workspace | None = None,
    batch_invariant: bool = False,
    variant: CompiledVariant = PLAIN,
    visited: Visited | None = None,
    new: NewToken | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a few new tokens a row over paged keys and values.

    Args:
        q: `[T, H, D]` queries after RoPE; T = B, one a row, unless `cu_seqlens_q` is given.
        k_pages: `[N, P, G, D]` pages of keys, any strides but 1 in the last dimension; `v_pages` with the same.
        page_table: `[B, columns]` int32; columns that no query of the row sees are not read.
        seq_lens: `[B]` int32, keys of each row after the append.
        scale: factor on the scores.
        window: keys a query sees, itself included; all by default.
        softcap: scores become `softcap * tanh(score / softcap)`.
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin, for more than one new token a row.
        max_query_len: the most new tokens of a row, known on the host.
        workspace: room for partial states, for one stream; a new one by default.
        batch_invariant: a row's output and LSE are bitwise the same whatever the other rows, the width of the page table
            and the places of the pages; slower where there are few rows.
        variant: what attention does besides.
        visited: the tiles that its mask shows; see `paged.visited_tiles`. Without it all are visited.
        new: key and value of the one new token of a single row, which this launch normalises, rotates and writes to their
            slot; q is before norm and RoPE then. See `appends`.

    Returns:
        Output `[T, H, D]` in q's dtype and LSE `[T, H]` fp32, natural logarithm; 0 and -inf where a query sees no key.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    room = workspace or Workspace(q.device)
    out, lse, _ = decode_launch(
        q, k_pages, v_pages, page_table, seq_lens, scale=scale, window=window, softcap=softcap, cu_seqlens_q=cu_seqlens_q,
        max_query_len=max_query_len, workspace=room, batch_invariant=batch_invariant, variant=variant, visited=visited,
        new=new,
    )  # fmt: skip
    return out, lse


def appends(q: Tensor, k_pages: Tensor) -> bool:
    """Whether decode of one token a row, without variant or softcap, and not batch-invariant, can append it as well."""
    return q.shape[0] == 1 and takes_new_token(q, k_pages)


def decode_launch(
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
    cu_seqlens_q: Tensor | None = None,
    max_query_len: int = 1,
    batch_invariant: bool = False,
    variant: CompiledVariant = PLAIN,
    visited: Visited | None = None,
    new: NewToken | None = None,
) -> tuple[Tensor, Tensor, Launch | None]:
    """`paged_decode`, and the launch, to be repeated on other queries, keys, values and output; None without tokens."""
    check_pages(q, k_pages, v_pages)
    tokens, heads, dim = q.shape
    rows, page, groups = seq_lens.shape[0], k_pages.shape[1], k_pages.shape[2]
    if page_table.shape[0] != rows or (cu_seqlens_q is None and tokens != rows):
        raise ValueError(
            f"page_table has {page_table.shape[0]} rows, seq_lens {rows} and q {tokens}; expected one a row, or cu_seqlens_q"
        )
    window = variant.window_with(window)
    few = rows <= (MOST_ROWS_OF_8_BITS if is_eight_bits(k_pages) else 1) and cu_seqlens_q is None and rows > 0
    few = few and not batch_invariant and q.element_size() == 2 and variant.hooks == NO_HOOKS
    if new is not None:
        if not few or not appends(q, k_pages) or softcap is not None:
            raise ValueError(
                f"q {tuple(q.shape)}, {q.dtype}, over pages of {k_pages.dtype}: a new token is appended to a single row of "
                "16 bits, without a variant or softcap, and not batch-invariant; take rope_append"
            )
        check_new_token(q, k_pages, new)
    if few:
        return decode_row(
            q, k_pages, v_pages, page_table, seq_lens, scale=scale, window=window, softcap=softcap, workspace=workspace,
            new=new,
        )  # fmt: skip
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if not tokens:
        return out, lse, None
    ratio, block_d = heads // groups, power_of_2(dim)
    arch, queries = arch_of(q.device), max_query_len * ratio
    tile = tile_of_decode(q, k_pages, page_table, max_query_len, workspace.processors, batch_invariant, variant)
    if visited is not None:
        check_visited(visited, rows, 0, tile.block_n)
    block_m = 16 if batch_invariant else min(max(power_of_2(queries), 16), tile.block_m)
    merge_rows = 16 if batch_invariant else min(power_of_2(queries), 16)
    # The same number of programs for each kv head.
    chunks = max(tile.programs * workspace.processors // groups, 1)
    blocks = triton.cdiv(queries, block_m)
    unit, parts = 1, 2 * chunks * groups
    in_many = chunks >= MANY_PARTS * rows * blocks and block_d <= 128
    in_flight = MERGE_ELEMENTS_MANY if in_many else MERGE_ELEMENTS
    if batch_invariant:
        unit, in_flight = INVARIANT_KEYS // tile.block_n, MERGE_ELEMENTS
        parts = rows * groups * blocks * (triton.cdiv(page_table.shape[1] * page, INVARIANT_KEYS) + 1)
    overlap = tile.overlaps and overlaps_launches(arch)
    factor, cap = score_factors(scale, softcap, variant.hooks)
    precision = "tf32x3" if tile.on_matrix_unit else matrix_precision(q.dtype, block_m)
    partial, partial_sum, arrived = workspace.split_kv(parts, block_m, block_d)
    launch = Launch(
        split_kv_kernel, (groups, chunks),
        (
            q, k_pages, v_pages, out, lse, page_table, cu_seqlens_q, seq_lens, partial, partial_sum, arrived,
            rows, window or 0, factor, cap,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            variant.tensors, None if visited is None else visited.for_kernel(),
        ),
        dict(
            GROUPS=groups, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
            BLOCK_B=max(power_of_2(rows), 16), BLOCK_M=block_m, BLOCK_N=tile.block_n, UNIT=unit,
            STAGES=stages_with(variant, tile.stages, block_m, tile.block_n, masked=visited is None),
            ITEM_KEYS=ITEM_KEYS, UNEVEN_KEYS=UNEVEN_KEYS, MOST_WHOLE=tile.programs,
            MERGED=MERGED_ROWS / min(power_of_2(queries), block_m),
            MERGE_ROWS=merge_rows, MERGE_PARTS=min(max(in_flight // (merge_rows * block_d), 1), 8),
            OVERLAP=overlap, ONE_BLOCK=queries <= block_m,
            LISTS=1 if visited is None else visited.counts.shape[1],
            HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
            PRECISION=precision, HOOKS=variant.hooks_for(q.dtype),
            num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
        ),
    )  # fmt: skip
    with on_device_of(q):
        launch.first()
    return out, lse, launch
