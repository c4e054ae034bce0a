"""Paged decode and short appends: split-KV attention that plans its own split, in one launch.

The R query heads of a key/value head (and the new tokens of a row) are packed into one matrix-unit tile. For each kv head
the K/V tiles of all items (row, query block) form one flat list, which as many programs cut into equal ranges by themselves
from `seq_lens` ("Stream-K", Osama et al., 2023; split-KV is "Flash-Decoding", Dao et al., 2023): ragged lengths are
balanced, nothing is planned on the host or by another launch, and a captured graph follows lengths that changed. To begin
and end an item takes a program as long as to read some hundred keys, so that it counts as so many in the list, and a
program with many short rows gets fewer keys. Where rows are so alike that ranges get hardly longer, every item is cut into
as many parts instead, or every program takes as many whole ones. A program holds at most two partial states, its first and
its last. The last program to arrive at a split item merges its parts by LSE in fixed order, so results are bitwise
repeatable. A single row is `decode_row.py`'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hf_fastattn.kernels.attention.configs import split_kv_tile
from hf_fastattn.kernels.attention.decode_row import decode_row
from hf_fastattn.kernels.attention.shares import program_of
from hf_fastattn.kernels.attention.tile import score_factors, softmax_end, softmax_step, tile_scores
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.launch import arch_of, check_pages, dot_precision, on_device_of, overlaps_launches, power_of_2

# Keys of a part in batch-invariant mode: a multiple of every tile, few enough that one long row still fills the GPU.
INVARIANT_KEYS = 1024
# Fp32 elements of partial states that a merging program has in flight, in registers.
MERGE_ELEMENTS = 4096
# The same where items may be cut into MANY_PARTS or more, so that merging them takes much of the time.
MERGE_ELEMENTS_MANY, MANY_PARTS = 16384, 8
# Query rows of a part that a program merges in the time in which one reads a key.
MERGED_ROWS = 2
# Keys that a program reads in the time which beginning and ending an item takes: what an item counts in the list.
ITEM_KEYS = 192
# By how many keys equal parts may make the longest range longer before the list is cut regardless of items.
UNEVEN_KEYS = 384


@triton.jit
def _find_item(
    position, upto, fill, spare, seq_lens_ptr, cu_seqlens_ptr, window,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The item at a position of the list, of which `upto: [BLOCK_B]` says where each row ends.

    Its row, the row's keys, first query and number of queries; the first key that one of them sees, and its unit; units of
    each item of the row, and those that it takes in the list; its query block, and the unit at the position.
    """
    before = upto <= position
    b = tl.sum(before.to(tl.int32), 0)
    base = tl.max(tl.where(before, upto, 0), 0)
    length = tl.load(seq_lens_ptr + b)
    if cu_seqlens_ptr is None:
        first_token = b
        new = 1
    else:
        first_token = tl.load(cu_seqlens_ptr + b)
        new = tl.load(cu_seqlens_ptr + b + 1) - first_token
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - new + 1 - window, 0)
    first_unit = lowest // (UNIT * BLOCK_N)
    count = tl.maximum((length + UNIT * BLOCK_N - 1) // (UNIT * BLOCK_N) - first_unit, 1)
    filled = (count + fill - 1) // fill * fill + tl.where(length > 0, spare, 0)
    block, unit = (position - base) // filled, (position - base) % filled
    return b, length, first_token, new, lowest, first_unit, count, filled, block, unit


@triton.jit(do_not_specialize=["rows", "window", "stride_table"])
def split_kv_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, cu_seqlens_ptr, seq_lens_ptr,
    partial_ptr, partial_sum_ptr, arrived_ptr,
    rows, window, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
    ITEM_KEYS: tl.constexpr, UNEVEN_KEYS: tl.constexpr, MOST_WHOLE: tl.constexpr, MERGED: tl.constexpr,
    MERGE_ROWS: tl.constexpr, MERGE_PARTS: tl.constexpr, OVERLAP: tl.constexpr, ONE_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One persistent program: an equal share of the flat list of units, each UNIT tiles of keys.

    `cu_seqlens_ptr` is None in decode. With UNIT = 1 a program treats neighbouring units as one; with more, each unit is a
    part of its own, cut at multiples of UNIT tiles, so that a row is added up in the same way whatever the other rows.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    # Neighbours do the same for all heads, so that what they read lies together.
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)

    # ---- the list: rows, in each the query blocks, in each the units
    row = tl.arange(0, BLOCK_B)
    valid = row < rows
    lengths = tl.load(seq_lens_ptr + row, mask=valid, other=0)
    if cu_seqlens_ptr is None:
        news = tl.full([BLOCK_B], 1, tl.int32)
    else:
        news = tl.load(cu_seqlens_ptr + row + 1, mask=valid, other=0) - tl.load(cu_seqlens_ptr + row, mask=valid, other=0)
    blocks = (news * RATIO + BLOCK_M - 1) // BLOCK_M
    units = (lengths + UNIT * BLOCK_N - 1) // (UNIT * BLOCK_N)
    if HAS_WINDOW:
        units -= tl.maximum(lengths - news + 1 - window, 0) // (UNIT * BLOCK_N)
    # A row without keys has an output too.
    units = tl.where(valid, tl.maximum(units, 1), 0)
    # Either units are filled up to multiples of `fill` for each item, or `spare` units stand for what it costs besides.
    fill = 1
    whole = 1
    spare = 0
    if UNIT == 1:
        items = rows
        if not ONE_BLOCK:
            items = tl.sum(tl.where(valid, blocks, 0), 0)
        # In more parts than these an item is merged for longer than each of them is read.
        most = tl.sqrt((tl.max(units, 0) * BLOCK_N).to(tl.float32) * MERGED).to(tl.int32)
        chunks = tl.maximum(tl.minimum(chunks, items * tl.maximum(most, 1)), 1)
        splits = chunks // tl.maximum(items, 1)
        even = tl.cdiv(tl.max(units, 0), tl.maximum(splits, 1))
        several = tl.cdiv(items, chunks)
        longest = tl.sum(units * blocks, 0) // chunks + 1 + UNEVEN_KEYS // BLOCK_N
        # Programs that begin and end whole items all at one time leave the memory idle meanwhile; that paid for as many
        # items as programs that share a multiprocessor.
        if (several <= MOST_WHOLE) & (several * even <= longest):
            fill = even
            whole = several
        else:
            spare = ITEM_KEYS // BLOCK_N
    spares = tl.where(lengths > 0, spare, 0)
    upto = tl.cumsum(tl.where(valid, (units + fill - 1) // fill * fill + spares, 0) * blocks, 0)
    total = tl.max(upto, 0)
    # The first `extra` chunks are one unit longer than the others.
    share = total // chunks
    extra = total % chunks
    if fill > 1:
        share = whole * fill
        extra = 0
    position = chunk * share + tl.minimum(chunk, extra)
    end = tl.minimum(position + share + (chunk < extra).to(tl.int32), total)

    if (spare > 0) & (position < end):
        # A range that begins in what stands for the cost of an item begins with the next one.
        _, _, _, _, _, _, count, filled, _, unit = _find_item(
            position, upto, fill, spare, seq_lens_ptr, cu_seqlens_ptr, window, UNIT, BLOCK_N, HAS_WINDOW
        )
        position += tl.where(unit >= count, filled - unit, 0)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    while position < end:
        b, length, first_token, new, lowest, first_unit, count, filled, block, unit = _find_item(
            position, upto, fill, spare, seq_lens_ptr, cu_seqlens_ptr, window, UNIT, BLOCK_N, HAS_WINDOW
        )
        take = tl.minimum(count - unit, end - position) if UNIT == 1 else 1
        base = position - unit
        position += take
        if unit + take == count:
            position += filled - count
        first_query = 0 if ONE_BLOCK else block * BLOCK_M
        query = first_query + m

        # ---- attention of the packed queries over units [unit, unit + take)
        token = query // RATIO
        ok_m = token < new
        place = (first_token + token).to(tl.int64) * stride_qt + (head * RATIO + query % RATIO) * stride_qh
        q = tl.load(q_ptr + place[:, None] + d[None, :], mask=ok_m[:, None] & (d < D)[None, :], other=0.0)
        last_key = length - new + token  # [BLOCK_M] the last key that each query sees
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        table = page_table_ptr + b.to(tl.int64) * stride_table
        start = (first_unit + unit) * UNIT * BLOCK_N
        stop = tl.minimum(start + take * UNIT * BLOCK_N, length)
        if HAS_WINDOW:
            start = tl.maximum(start, lowest // BLOCK_N * BLOCK_N)
        for key in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
            key_n = key + n
            ok_n = (key_n < length) & (key_n >= lowest)
            page = tl.load(table + key_n // PAGE, mask=ok_n, other=0)
            # One offset for K and V, whose strides agree.
            slot = page.to(tl.int64) * stride_page + (key_n % PAGE) * stride_slot
            offset = slot[:, None] + (head * stride_head + d)[None, :]
            ok = ok_n[:, None] & (d < D)[None, :]
            k = tl.load(k_ptr + offset, mask=ok, other=0.0)
            scores = tile_scores(q, k, scale, softcap, HAS_SOFTCAP, PRECISION)
            seen = (key_n[None, :] <= last_key[:, None]) & ok_n[None, :]
            if HAS_WINDOW:
                seen = seen & (key_n[None, :] > last_key[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            v = tl.load(v_ptr + offset, mask=ok, other=0.0)
            row_max, row_sum, acc = softmax_step(scores, v, row_max, row_sum, acc, scale, HAS_SOFTCAP, PRECISION)

        if take == count:
            out, lse = softmax_end(row_max, row_sum, acc)
            out_row = (first_token + token).to(tl.int64) * (GROUPS * RATIO) + head * RATIO + query % RATIO
            tl.store(
                out_ptr + out_row[:, None] * D + d[None, :],
                out.to(out_ptr.dtype.element_ty),
                mask=ok_m[:, None] & (d < D)[None, :],
            )
            tl.store(lse_ptr + out_row, lse, mask=ok_m)
        else:
            # ---- a part of a split item; its parts are numbered `first` to `last`
            if UNIT == 1:
                first = program_of(base, share, extra)
                last = program_of(base + count - 1, share, extra)
                # By programs: a split item is the last one of its first program and the first one of all others.
                part = chunk * 2 + (chunk == first).to(tl.int32)
            else:
                first = base
                last = base + count - 1
                part = base + unit
            part = part * GROUPS + head
            in_part = (part * BLOCK_M + m)[:, None] * BLOCK_D + d[None, :]
            tl.store(partial_ptr + in_part, acc, mask=ok_m[:, None])
            # Maximum and sum apart: their logarithm in one number would round the weight of the part.
            tl.store(partial_sum_ptr + (part * BLOCK_M + m) * 2, row_max)
            tl.store(partial_sum_ptr + (part * BLOCK_M + m) * 2 + 1, row_sum)
            tl.debug_barrier()
            arrived = tl.atomic_add(arrived_ptr + first * GROUPS + head, 1, sem="acq_rel", scope="gpu")
            if arrived == last - first:
                tl.store(arrived_ptr + first * GROUPS + head, 0)
                merge_parts(
                    partial_ptr, partial_sum_ptr, out_ptr, lse_ptr, first, last, first_token, new, head, first_query,
                    GROUPS, RATIO, D, BLOCK_D, BLOCK_M, UNIT, MERGE_ROWS, MERGE_PARTS,
                )  # fmt: skip


@triton.jit
def merge_parts(
    partial_ptr, partial_sum_ptr, out_ptr, lse_ptr, first, last, first_token, new, head, first_query,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr, MERGE_ROWS: tl.constexpr, MERGE_PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the parts `first` to `last`, in order, for MERGE_ROWS query rows at a time."""
    d = tl.arange(0, BLOCK_D)
    for row in range(0, BLOCK_M, MERGE_ROWS):
        m = row + tl.arange(0, MERGE_ROWS)
        query = first_query + m
        ok_m = query // RATIO < new
        row_max = tl.full([MERGE_ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([MERGE_ROWS], tl.float32)
        acc = tl.zeros([MERGE_ROWS, BLOCK_D], tl.float32)
        for number in range(first, last + 1, MERGE_PARTS):
            # Unrolled, and without a reduction over threads: the loads of all these parts are in flight together.
            for u in tl.static_range(MERGE_PARTS):
                ok = query // RATIO < tl.where(number + u <= last, new, 0)
                part = number + u
                if UNIT == 1:
                    part = part * 2 + (part == first).to(tl.int32)
                part = (part * GROUPS + head) * BLOCK_M + m
                # Past the first-level cache, which may hold what stood there before another program wrote.
                part_max = tl.load(partial_sum_ptr + part * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
                part_sum = tl.load(partial_sum_ptr + part * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
                place = part[:, None] * BLOCK_D + d[None, :]
                x = tl.load(partial_ptr + place, mask=ok[:, None], other=0.0, cache_modifier=".cg")
                new_max = tl.maximum(row_max, part_max)
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                weight = tl.math.exp2(part_max - shift)
                decay = tl.math.exp2(row_max - shift)
                row_sum = row_sum * decay + part_sum * weight
                acc = acc * decay[:, None] + x * weight[:, None]
                row_max = new_max
        out, lse = softmax_end(row_max, row_sum, acc)
        out_row = (first_token + query // RATIO).to(tl.int64) * (GROUPS * RATIO) + head * RATIO + query % RATIO
        tl.store(
            out_ptr + out_row[:, None] * D + d[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=ok_m[:, None] & (d < D)[None, :],
        )
        tl.store(lse_ptr + out_row, lse, mask=ok_m)


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

    Returns:
        Output `[T, H, D]` in q's dtype and LSE `[T, H]` fp32, natural logarithm; 0 and -inf where a query sees no key.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_pages(q, k_pages, v_pages)
    tokens, heads, dim = q.shape
    rows, page, groups = seq_lens.shape[0], k_pages.shape[1], k_pages.shape[2]
    if page_table.shape[0] != rows or (cu_seqlens_q is None and tokens != rows):
        raise ValueError(
            f"page_table has {page_table.shape[0]} rows, seq_lens {rows} and q {tokens}; expected one a row, or cu_seqlens_q"
        )
    room = workspace or Workspace(q.device)
    if rows == 1 and cu_seqlens_q is None and not batch_invariant and q.element_size() == 2:
        return decode_row(
            q, k_pages, v_pages, page_table, seq_lens, scale=scale, window=window, softcap=softcap, workspace=room
        )
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if not tokens:
        return out, lse
    ratio, block_d = heads // groups, power_of_2(dim)
    arch, queries = arch_of(q.device), max_query_len * ratio
    pairs = None if batch_invariant else rows * groups
    tile = split_kv_tile(arch, q.element_size(), block_d, queries, pairs, room.processors)
    block_m = 16 if batch_invariant else min(max(power_of_2(queries), 16), tile.block_m)
    merge_rows = 16 if batch_invariant else min(power_of_2(queries), 16)
    # As many for each kv head.
    chunks = max(tile.programs * room.processors // groups, 1)
    blocks = triton.cdiv(queries, block_m)
    unit, parts = 1, 2 * chunks * groups
    in_many = chunks >= MANY_PARTS * rows * blocks and block_d <= 128
    in_flight = MERGE_ELEMENTS_MANY if in_many else MERGE_ELEMENTS
    if batch_invariant:
        unit, in_flight = INVARIANT_KEYS // tile.block_n, MERGE_ELEMENTS
        parts = rows * groups * blocks * (triton.cdiv(page_table.shape[1] * page, INVARIANT_KEYS) + 1)
    # Programs of the next launch that wait beside these ones pay only where they do not crowd them.
    overlap = tile.programs == 1 and overlaps_launches(arch)
    factor, cap = score_factors(scale, softcap)
    partial, partial_sum, arrived = room.split_kv(parts, block_m, block_d)
    with on_device_of(q):
        split_kv_kernel[(groups, chunks)](
            q, k_pages, v_pages, out, lse, page_table, cu_seqlens_q, seq_lens, partial, partial_sum, arrived,
            rows, window or 0, factor, cap,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            GROUPS=groups, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
            BLOCK_B=max(power_of_2(rows), 16), BLOCK_M=block_m, BLOCK_N=tile.block_n, UNIT=unit,
            STAGES=tile.stages, ITEM_KEYS=ITEM_KEYS, UNEVEN_KEYS=UNEVEN_KEYS, MOST_WHOLE=tile.programs,
            MERGED=MERGED_ROWS / min(power_of_2(queries), block_m),
            MERGE_ROWS=merge_rows, MERGE_PARTS=min(max(in_flight // (merge_rows * block_d), 1), 8),
            OVERLAP=overlap, ONE_BLOCK=queries <= block_m, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
            PRECISION=dot_precision(q.dtype), num_warps=tile.warps, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return out, lse
