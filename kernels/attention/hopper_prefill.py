"""Paged prefill and append on Hopper, in Gluon: TMA, asynchronous matrix products, specialised warps.

A program is a producer warp, which loads queries and, through the page table, K/V pages, and two consumer warpgroups of 64
packed query rows each. A warpgroup issues the product with K of a tile together with the product with V of the tile before.
The warpgroups take turns on the tensor cores, so that the softmax of one overlaps the products of the other
("FlashAttention-3", Shah et al., 2024). Rows are (token, query head of the kv head), packed by a three-dimensional TMA box
if R is a power of two; a tile of K or V is filled by one box a page. Programs are persistent and take their tiles from a
work list made on the device, so a captured graph follows lengths that changed. The tiles of a row are taken from its end,
so that the masked ones come first. What depends on the distance of query and key alone is computed once a head
and distance of a tile. Producer, consumers and launcher agree on barriers and shared memory line by line, and so stand
in one file.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_fastattn.kernels.attention.hopper_items import (
    item_of,
    items_of_program,
    key_of,
    listed_tile,
    lists_of,
    number_of,
    tile_of,
)
from hf_fastattn.kernels.attention.hopper_registers import (
    copy_registers,
    pack_pairs,
    partial_row_sums,
    schedule_fence,
    turn_pass,
    turn_wait,
    unpack_pairs,
)
from hf_fastattn.kernels.attention.hopper_softmax import LOG2E, shown_pairs, softmax_step, values_of_distances
from hf_fastattn.kernels.attention.prefix_items import ITEM
from hf_fastattn.kernels.attention.tile import score_factors
from hf_fastattn.kernels.attention.visited import Visited, check_visited, prefill_tiles
from hf_fastattn.kernels.attention.work_list import WorkLists, work_list
from hf_fastattn.kernels.gluon_spelling import load_box
from hf_fastattn.kernels.launch import ASSEMBLER_OPTIONS, check_pages, on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import PLAIN, CompiledVariant

BLOCK_M = 128
# head dim -> (keys a tile, number of K/V buffers), chosen to fill the shared memory
TILES = {64: (128, 4), 128: (128, 3), 256: (64, 2)}
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


@gluon.jit
def _load_pages(
    desc, bar, buffer, table, first_key, pages, head, groups, beyond,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, HEADS_FIRST: gl.constexpr,
):  # fmt: skip
    """Fill a tile with keys from `first_key` on; pages past the last one come from row `beyond`, where TMA reads zeros."""
    BOX: gl.constexpr = PAGE if PAGE < BLOCK_N else BLOCK_N
    mbarrier.expect(bar, BLOCK_N * D * 2)
    for p in gl.static_range(BLOCK_N // BOX):
        key = first_key + p * BOX
        column = key // PAGE
        page = gl.load(table + gl.maximum(gl.minimum(column, pages - 1), 0))
        if HEADS_FIRST:
            row = (page * groups + head) * PAGE
            first_column = 0
        else:
            row = page * PAGE
            first_column = head * D
        if PAGE > BLOCK_N:
            row += key % PAGE
        row = gl.where(column < pages, row, beyond)
        if BLOCK_N == BOX:
            load_box(desc, [row, first_column], bar, buffer)
        else:
            load_box(desc, [row, first_column], bar, buffer.slice(p * BOX, BOX, 0))


@gluon.jit
def _producer(descs, buffers, bars, pointers, numbers, visited, CFG: gl.constexpr, LISTS: gl.constexpr):
    """The producer warp: loads K of a tile, then V of the tile before.

    K and V of one tile have the same buffer index, and share its `empty` barrier.
    """
    q_desc, k_desc, v_desc = descs
    q_s, k_s, v_s = buffers
    q_full, q_empty, k_full, v_full, kv_empty = bars
    work, page_table, cu_seqlens, seq_lens = pointers
    items, stride_table, groups, ratio, beyond = numbers
    BLOCK_M: gl.constexpr = CFG[0]
    BLOCK_N: gl.constexpr = CFG[1]
    D: gl.constexpr = CFG[2]
    BUFFERS: gl.constexpr = CFG[3]
    PAGE: gl.constexpr = CFG[4]
    HEADS_FIRST: gl.constexpr = CFG[5]
    PACKED: gl.constexpr = CFG[6]
    done = 0
    q_phase = 1
    for t in range(items[0], items[1], items[2]):
        b, first_query, slot, first_token, new, length, count, origin = tile_of(work, cu_seqlens, seq_lens, t, CFG)
        head = slot * PACKED // ratio
        table = page_table + b * stride_table
        pages = (origin + length + PAGE - 1) // PAGE
        if LISTS > 0:
            lists = lists_of(visited, t, groups * ratio // PACKED, LISTS)
            count = gl.maximum(lists[1] + lists[2], 1)
            first_key = number_of(listed_tile(lists, 0)) * BLOCK_N
        s = done % BUFFERS
        mbarrier.wait(kv_empty.index(s), ((done // BUFFERS) & 1) ^ 1)
        if LISTS == 0:
            first_key = (count - 1) * BLOCK_N
        _load_pages(
            k_desc, k_full.index(s), k_s.index(s), table, origin + first_key, pages, head, groups, beyond,
            PAGE, BLOCK_N, D, HEADS_FIRST,
        )  # fmt: skip
        done += 1
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), q_phase)
            mbarrier.expect(q_full.index(w), (BLOCK_M // 2) * D * 2)
            token = first_token + (first_query + w * (BLOCK_M // 2)) // PACKED
            load_box(q_desc, [token, slot * PACKED, 0], q_full.index(w), q_s.index(w))
        q_phase ^= 1
        for j in range(1, count):
            if LISTS > 0:
                key_before = first_key
                first_key = number_of(listed_tile(lists, j)) * BLOCK_N
            s = done % BUFFERS
            mbarrier.wait(kv_empty.index(s), ((done // BUFFERS) & 1) ^ 1)
            if LISTS == 0:
                first_key = (count - 1 - j) * BLOCK_N
            _load_pages(
                k_desc, k_full.index(s), k_s.index(s), table, origin + first_key, pages, head, groups, beyond,
                PAGE, BLOCK_N, D, HEADS_FIRST,
            )  # fmt: skip
            s = (done - 1) % BUFFERS
            if LISTS == 0:
                key_before = (count - j) * BLOCK_N
            _load_pages(
                v_desc, v_full.index(s), v_s.index(s), table, origin + key_before, pages, head, groups, beyond,
                PAGE, BLOCK_N, D, HEADS_FIRST,
            )  # fmt: skip
            done += 1
        s = (done - 1) % BUFFERS
        last_loaded = origin + (first_key if LISTS > 0 else 0)
        _load_pages(
            v_desc, v_full.index(s), v_s.index(s), table, last_loaded, pages, head, groups, beyond,
            PAGE, BLOCK_N, D, HEADS_FIRST,
        )  # fmt: skip


@gluon.jit
def _clear_tail(v, valid, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Zero the rows of a V tile `[BLOCK_N, D]` from `valid` on: the rest of a page may hold NaN, and 0 * NaN is NaN.

    Both warpgroups do it, with the same values, so they need not wait for each other.
    """
    ROWS: gl.constexpr = 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for c in gl.static_range(BLOCK_N // ROWS):
        if c * ROWS + ROWS > valid:
            part = v.slice(c * ROWS, ROWS, 0)
            row = c * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            x = part.load(LAYOUT)  # [ROWS, D]
            zero = gl.full([ROWS, D], 0.0, v.dtype, LAYOUT)
            part.store(gl.where(gl.expand_dims(row < valid, 1), x, zero))
    fence_async_shared()


@gluon.jit
def _first_weights(scores, given, DTYPE: gl.constexpr, CFG: gl.constexpr, MASK: gl.constexpr, HOOKS: gl.constexpr):
    """Of the scores of the first tile the weights in pairs, their partial sums, and the maxima."""
    row_max, scale, last_key, first_key, pairs, by_distance = given
    LAYOUT: gl.constexpr = scores.type.layout
    seen = shown_pairs(first_key, pairs, LAYOUT, CFG[1], MASK, HOOKS)
    weights, decay, row_max = softmax_step(
        scores, row_max, scale, last_key, first_key, pairs, by_distance, seen, CFG, LAYOUT, CFG[1], MASK, HOOKS
    )
    return pack_pairs(weights, DTYPE), partial_row_sums(weights), row_max


@gluon.jit
def _step(
    acc, packed, row_max, row_sum, done, first_key, q_s, k_s, v_s, bars, scale, last_key, pairs,
    WARPGROUP: gl.constexpr, CFG: gl.constexpr, MASK: gl.constexpr, HOOKS: gl.constexpr,
):  # fmt: skip
    """Scores of one tile, and meanwhile the product of weights and V of the tile before.

    `acc: [64, D]`; `packed: [64, BLOCK_N / 2]` are the weights of the tile before; `row_sum: [64, 4]` are partial sums.
    """
    q_full, q_empty, k_full, v_full, kv_empty = bars
    BLOCK_N: gl.constexpr = CFG[1]
    D: gl.constexpr = CFG[2]
    BUFFERS: gl.constexpr = CFG[3]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    k_stage = done % BUFFERS
    v_stage = (done - 1) % BUFFERS
    mbarrier.wait(k_full.index(k_stage), (done // BUFFERS) & 1)
    turn_wait(WARPGROUP)
    scores = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    # [64, D] times [D, BLOCK_N]
    scores = warpgroup_mma(q_s, k_s.index(k_stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    weights = unpack_pairs(packed, q_s.dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))
    mbarrier.wait(v_full.index(v_stage), ((done - 1) // BUFFERS) & 1)
    # [64, BLOCK_N] times [BLOCK_N, D]
    acc = warpgroup_mma(weights, v_s.index(v_stage), acc, is_async=True)
    turn_pass(1 - WARPGROUP)
    by_distance = values_of_distances(first_key, pairs, CFG, HOOKS)
    seen = shown_pairs(first_key, pairs, S_LAYOUT, BLOCK_N, MASK, HOOKS)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    new, decay, row_max = softmax_step(
        scores, row_max, scale, last_key, first_key, pairs, by_distance, seen, CFG, S_LAYOUT, BLOCK_N, MASK, HOOKS
    )
    sums = schedule_fence(partial_row_sums(new))
    SUMS: gl.constexpr = row_sum.type.layout
    row_sum = row_sum * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, SUMS), assert_trivial=True), 1) + sums
    acc, weights, new = warpgroup_mma_wait(0, deps=(acc, weights, new))
    mbarrier.arrive(kv_empty.index(v_stage), count=1)
    # Only after the wait: until then the product reads the old weights from their registers.
    packed = pack_pairs(new, q_s.dtype)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True), 1)
    return acc, packed, row_max, row_sum


@gluon.jit
def _store_state(
    partial_ptr, sums_ptr, item, acc, row_max, row_sum, WARPGROUP: gl.constexpr, new, PACKED: gl.constexpr,
):  # fmt: skip
    """The state of a part of a prefix, as `prefix_lists.store_state`: its rows lie where the work item says."""
    D: gl.constexpr = acc.shape[1]
    at = gl.load(item + 6)
    stride = gl.load(item + 7)
    r = WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
    d = gl.arange(0, D, gl.SliceLayout(0, acc.type.layout))
    off = (at + r // PACKED * stride + r % PACKED).to(gl.int64) * D  # [64]
    gl.store(partial_ptr + gl.expand_dims(off, 1) + gl.expand_dims(d, 0), acc, mask=gl.expand_dims(r // PACKED < new, 1))
    r = WARPGROUP * 64 + gl.arange(0, 64, row_max.type.layout)
    off = (at + r // PACKED * stride + r % PACKED) * 2
    gl.store(sums_ptr + off, row_max, mask=r // PACKED < new)
    gl.store(sums_ptr + off + 1, row_sum, mask=r // PACKED < new)


@gluon.jit
def _consumer(
    WARPGROUP: gl.constexpr, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors,
    CFG: gl.constexpr, LISTS: gl.constexpr, HOOKS: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 packed query rows of each tile."""
    q_all, k_s, v_s = buffers
    q_full, q_empty, k_full, v_full, kv_empty = bars
    items, stride_table, groups, ratio, beyond = numbers
    BLOCK_N: gl.constexpr = CFG[1]
    D: gl.constexpr = CFG[2]
    BUFFERS: gl.constexpr = CFG[3]
    PACKED: gl.constexpr = CFG[6]
    PREFIXES: gl.constexpr = CFG[8]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    LN2: gl.constexpr = 0.6931471805599453
    q_s = q_all.index(WARPGROUP).reshape([64, D])
    dtype: gl.constexpr = q_s.dtype
    heads = groups * ratio
    done = 0
    q_phase = 0
    if WARPGROUP == 1:
        turn_pass(0)
    for t in range(items[0], items[1], items[2]):
        b, first_query, slot, first_token, new, length, count, masked, first_key, listed, hides = item_of(
            pointers, numbers, visited, t, CFG, LISTS
        )
        mine = first_query + WARPGROUP * 64
        query = mine + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))  # [64]
        q_idx = query // PACKED + (length - new)
        last_key = gl.minimum(q_idx, length - 1)
        first_position = mine // PACKED + (length - new)
        pairs = (b, slot * PACKED + query % PACKED, q_idx, window, tensors, slot * PACKED, first_position)
        if PREFIXES or (LISTS > 0 and not HOOKS.causal):
            last_key = length - 1 + query * 0
        row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
        acc = gl.zeros([64, D], gl.float32, O_LAYOUT)
        mbarrier.wait(q_full.index(WARPGROUP), q_phase)
        q_phase ^= 1
        # ---- the first step, on the last tile of keys: there is no product with V yet
        stage = done % BUFFERS
        phase = (done // BUFFERS) & 1
        mbarrier.wait(k_full.index(stage), phase)
        turn_wait(WARPGROUP)
        scores = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
        scores = warpgroup_mma(q_s, k_s.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
        turn_pass(1 - WARPGROUP)
        given = (row_max, scale, last_key, first_key, pairs, values_of_distances(first_key, pairs, CFG, HOOKS))
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if LISTS > 0 and HOOKS.mask_mod is not None:
            # Of most first tiles causality alone hides something, and masks may take memory to read.
            if hides:
                packed, row_sum, row_max = _first_weights(scores, given, dtype, CFG, 2, HOOKS)
            else:
                packed, row_sum, row_max = _first_weights(scores, given, dtype, CFG, 1, HOOKS)
        else:
            packed, row_sum, row_max = _first_weights(scores, given, dtype, CFG, 2, HOOKS)
        if first_key + BLOCK_N > length:
            mbarrier.wait(v_full.index(stage), phase)
            _clear_tail(v_s.index(stage), length - first_key, BLOCK_N, D)
        for j in range(1, gl.maximum(masked, 1)):
            key = key_of(listed, visited, j, count, masked, BLOCK_N, LISTS)
            acc, packed, row_max, row_sum = _step(
                acc, packed, row_max, row_sum, done + j, key, q_s, k_s, v_s, bars, scale, last_key, pairs,
                WARPGROUP, CFG, 2, HOOKS,
            )  # fmt: skip
        packed = copy_registers(packed)
        for j in range(gl.maximum(masked, 1), count):
            key = key_of(listed, visited, j, count, masked, BLOCK_N, LISTS)
            acc, packed, row_max, row_sum = _step(
                acc, packed, row_max, row_sum, done + j, key, q_s, k_s, v_s, bars, scale, last_key, pairs,
                WARPGROUP, CFG, 0, HOOKS,
            )  # fmt: skip
        done += count
        # ---- the product with V of the last step, and the end of the softmax
        stage = (done - 1) % BUFFERS
        operand = unpack_pairs(packed, dtype, gl.DotOperandLayout(0, O_LAYOUT, 2))
        mbarrier.wait(v_full.index(stage), ((done - 1) // BUFFERS) & 1)
        acc = warpgroup_mma(operand, v_s.index(stage), acc, is_async=True)
        acc, operand = warpgroup_mma_wait(0, deps=(acc, operand))
        mbarrier.arrive(kv_empty.index(stage), count=1)
        total = gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, S_LAYOUT), assert_trivial=True)
        if PREFIXES:
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
            _store_state(out_ptr, lse_ptr, pointers[0] + t * ITEM, acc, row_max, total, WARPGROUP, new, PACKED)
        else:
            if HOOKS.sink is not None:
                # In the sum only, as `hooked.hooked_sink`; the values are scaled with the sum.
                sink = HOOKS.sink(slot * PACKED + query % PACKED, tensors) * LOG2E
                most = gl.maximum(row_max, sink)
                shift = gl.where(most == float("-inf"), 0.0, most)
                decay = gl.exp2(row_max - shift)
                total = total * decay + gl.exp2(sink - shift)
                row_max = most
                inverse = gl.where(total > 0.0, decay / total, 0.0)
            elif HOOKS.sigmoid:
                inverse = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
            else:
                inverse = gl.where(total > 0.0, 1.0 / total, 0.0)
            out = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT), assert_trivial=True), 1)
            # ---- the output goes through the shared memory of the queries, to be stored 16 bytes a thread
            q_s.store(out.to(dtype))
            rows = q_s.load(STORE)
            fence_async_shared()
            mbarrier.arrive(q_empty.index(WARPGROUP), count=1)
            r = mine + gl.arange(0, 64, gl.SliceLayout(1, STORE))
            c = gl.arange(0, D, gl.SliceLayout(0, STORE))
            off_out = ((first_token + r // PACKED) * heads + slot * PACKED + r % PACKED).to(gl.int64) * D  # [64]
            inside = gl.expand_dims(r // PACKED < new, 1)
            gl.store(out_ptr + gl.expand_dims(off_out, 1) + gl.expand_dims(c, 0), rows, mask=inside)
            lse = (row_max + gl.log2(total)) * LN2
            at = (first_token + query // PACKED) * heads + slot * PACKED + query % PACKED
            gl.store(lse_ptr + at, lse, mask=query // PACKED < new)
    if WARPGROUP == 0:
        # Each turn that was passed must be waited for, also the last one, so that the barrier is left as it was found.
        turn_wait(0)


@gluon.jit(do_not_specialize=["stride_table", "groups", "ratio", "beyond"])
def hopper_prefill_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, work, page_table, cu_seqlens, seq_lens, items_ptr,
    stride_table, groups, ratio, beyond, scale, visited, window, tensors,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, BUFFERS: gl.constexpr, PAGE: gl.constexpr,
    HEADS_FIRST: gl.constexpr, PACKED: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    LISTS: gl.constexpr, HOOKS: gl.constexpr, DISTANCES: gl.constexpr, PREFIXES: gl.constexpr = False,
):  # fmt: skip
    """Shared memory, barriers, and the three roles: two consumer warpgroups and a producer warp.

    With PREFIXES the work items are parts of prefixes (`prefix_items.py`), all of whose keys every query sees, and what is
    stored are their states, not normalised.

    `visited` is a `Visited` of LISTS lists an item, or None; `window` is None without one.
    """
    CFG: gl.constexpr = (BLOCK_M, BLOCK_N, D, BUFFERS, PAGE, HEADS_FIRST, PACKED, DISTANCES, PREFIXES)
    dtype: gl.constexpr = q_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_N, D], LAYOUT)
    v_s = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_N, D], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=2)
    buffers = (q_s, k_s, v_s)
    bars = (q_full, q_empty, k_full, v_full, kv_empty)
    pointers = (work, page_table, cu_seqlens, seq_lens)
    numbers = (items_of_program(items_ptr, PREFIXES), stride_table, groups, ratio, beyond)
    gl.warp_specialize([
        (_consumer, (
            0, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors,
            CFG, LISTS, HOOKS
        )),
        (_consumer, (
            1, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors,
            CFG, LISTS, HOOKS
        )),
        (_producer, ((q_desc, k_desc, v_desc), buffers, bars, pointers, numbers, visited, CFG, LISTS)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def heads_first(pages: Tensor) -> bool | None:
    """Whether `pages: [N, P, G, D]` lie in memory as `[N, G, P, D]`; None if in neither order without gaps."""
    if pages.is_contiguous():
        return False
    return True if pages.transpose(1, 2).is_contiguous() else None


def packed_heads(ratio: int, variant: CompiledVariant) -> int:
    """Query heads that are packed with each token into the rows of a tile."""
    if variant.hooks.score_by_distance is not None:
        # Distances of a tile, and so values to look up, are fewest for one head: there is room for no more.
        return 1
    return ratio if ratio & (ratio - 1) == 0 and ratio <= BLOCK_M // 2 else 1


def why_not_variant(variant: CompiledVariant) -> str | None:
    """Why this kernel cannot take a variant; None if it can."""
    hooks = variant.hooks
    if hooks.query_transform is not None or hooks.key_transform is not None or hooks.output_transform is not None:
        return "transforms of vectors"
    return None


def why_not_hopper(q: Tensor, k_pages: Tensor, window: int | None, softcap: float | None) -> str | None:
    """Why this kernel cannot take a call; None if it can. The caller checks the device and the version of Triton."""
    page, dim = k_pages.shape[1], q.shape[-1]
    if q.dtype not in DTYPES or dim not in TILES:
        return f"dtype {q.dtype}, head dim {dim}"
    if window is not None or softcap is not None:
        return "a window or softcap"
    if page < 8 or page & (page - 1):
        return f"pages of {page} tokens"
    steps = [stride * q.element_size() for stride in q.stride()[:2]] + [q.data_ptr(), k_pages.data_ptr()]
    if heads_first(k_pages) is None or q.stride(2) != 1 or any(step % 16 for step in steps):
        return "strides or addresses that TMA cannot follow"
    return None


def descriptors(q: Tensor, k_pages: Tensor, v_pages: Tensor, packed: int) -> tuple[Any, Any, Any, int]:
    """What TMA is to know of queries, keys and values, and the row past the last one of keys, where it reads zeros.

    Args:
        q: `[T, H, D]` queries.
        k_pages: `[N, P, G, D]` pages of keys; `v_pages` of values.
        packed: as `packed_heads`.
    """
    pages, page, groups, dim = k_pages.shape
    order, block_n = heads_first(k_pages), TILES[dim][0]
    rows = pages * page * (groups if order else 1)
    flat = [(x.transpose(1, 2) if order else x).view(rows, -1) for x in (k_pages, v_pages)]
    q_box, kv_box = [BLOCK_M // 2 // packed, packed, dim], [min(page, block_n), dim]
    q_layout, kv_layout = (_layout(tuple(box), q.dtype) for box in (q_box, kv_box))
    q_desc = TensorDescriptor(q, list(q.shape), list(q.stride()), q_box, q_layout)
    k_desc, v_desc = (TensorDescriptor.from_tensor(x, kv_box, kv_layout) for x in flat)
    return q_desc, k_desc, v_desc, rows


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory; kept, since making it takes the host as long as a launch."""
    return gl.NVMMASharedLayout.get_default_for(list(box), DTYPES[dtype])


def hopper_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    processors: int,
    work_lists: WorkLists | None = None,
    window: int | None = None,
    variant: CompiledVariant = PLAIN,
    visited: Visited | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed rows of new tokens over paged keys and values; see `prefill.paged_prefill`.

    Args:
        q: `[T, H, D]` queries after RoPE, bf16 or fp16; D is 64, 128 or 256.
        k_pages: `[N, P, G, D]` pages of keys, without gaps, as they are or with G before P in memory; `v_pages` likewise.
        page_table: `[B, columns]` int32.
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin.
        seq_lens: `[B]` int32, keys of each row after the append.
        scale: factor on the scores.
        processors: multiprocessors of the GPU.
        work_lists: of earlier launches for the same `cu_seqlens_q`, as by other layers of a forward.
        window: keys a query sees, itself included; all by default.
        variant: what attention does besides; see `why_not_variant`.
        visited: the tiles that its mask and the window show, which it needs if there is one; see `paged.visited_tiles`.

    Returns:
        Output `[T, H, D]` in q's dtype and LSE `[T, H]` fp32, natural logarithm.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_pages(q, k_pages, v_pages)
    reason = why_not_hopper(q, k_pages, None, None)
    if reason or scale <= 0:
        raise ValueError(f"the Hopper kernel cannot take {reason or f'scale={scale}'}; use paged_prefill")
    tokens, heads, dim = q.shape
    page, groups = k_pages.shape[1:3]
    ratio, order = heads // groups, heads_first(k_pages)
    packed = packed_heads(ratio, variant)
    block_n, buffers = TILES[dim]
    window = variant.window_with(window)
    if visited is None and (window is not None or variant.hides_tiles or not variant.hooks.causal):
        raise ValueError("the Hopper kernel takes a window or a mask only with the tiles that they show; give visited")
    if visited is not None:
        check_visited(visited, prefill_tiles(tokens * packed, seq_lens.shape[0], BLOCK_M), BLOCK_M, block_n)
    hooks = variant.hooks_for(q.dtype)
    factor, _ = score_factors(scale, None, hooks)
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if not tokens:
        return out, lse
    lists, key = {} if work_lists is None else work_lists, (q.device, heads // packed, packed)
    if key not in lists:
        lists[key] = work_list(cu_seqlens_q, tokens, heads // packed, packed, BLOCK_M)
    work, tiles = lists[key]
    q_desc, k_desc, v_desc, beyond = descriptors(q, k_pages, v_pages, packed)
    with on_device_of(q):
        prepared(hopper_prefill_kernel)[(min(work.shape[0], processors),)](
            q_desc, k_desc, v_desc, out, lse, work, page_table, cu_seqlens_q, seq_lens, tiles,
            page_table.stride(0), groups, ratio, beyond, factor,
            None if visited is None else visited.for_kernel(), window, variant.tensors,
            BLOCK_M=BLOCK_M, BLOCK_N=block_n, D=dim, BUFFERS=buffers, PAGE=page, HEADS_FIRST=bool(order), PACKED=packed,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            LISTS=0 if visited is None else visited.counts.shape[1], HOOKS=hooks,
            DISTANCES=power_of_2(BLOCK_M // 2 // packed + block_n - 1), num_warps=4, maxnreg=168,
            ptx_options=ASSEMBLER_OPTIONS,
        )  # fmt: skip
    return out, lse
