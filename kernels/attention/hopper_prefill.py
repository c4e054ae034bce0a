"""Paged prefill and append on Hopper, in Gluon: TMA, asynchronous matrix products, specialised warps.

A program is a producer warp, which loads queries and, through the page table, K/V pages, and two consumer warpgroups of 64
packed query rows each. A warpgroup issues the product with K of a tile together with the product with V of the tile before.
The warpgroups take turns on the tensor cores, so that the softmax of one overlaps the products of the other
("FlashAttention-3", Shah et al., 2024). Rows are (token, query head of the kv head), packed by a three-dimensional TMA box
if R is a power of two; a tile of K or V is filled by one box a page. Programs are persistent and take their tiles from a
work list made on the device, so a captured graph follows lengths that changed. The tiles of a row are taken from its end,
so that the masked ones come first. Producer, consumers and launcher agree on barriers and shared memory line by line, and
so stand in one file.
"""

from __future__ import annotations

import functools

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

from hf_fastattn.kernels.attention.hopper_registers import (
    copy_registers,
    pack_pairs,
    partial_row_sums,
    row_maxima,
    schedule_fence,
    turn_pass,
    turn_wait,
    unpack_pairs,
)
from hf_fastattn.kernels.attention.tile import score_factors
from hf_fastattn.kernels.attention.visited import Visited, check_visited, prefill_tiles
from hf_fastattn.kernels.attention.work_list import WorkLists, work_list
from hf_fastattn.kernels.gluon_spelling import load_box
from hf_fastattn.kernels.launch import ASSEMBLER_OPTIONS, check_pages, on_device_of
from hf_fastattn.kernels.launch import LOG2E as LOG2E_FLOAT
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import PLAIN, CompiledVariant

LOG2E = gl.constexpr(LOG2E_FLOAT)
BLOCK_M = 128
# head dim -> (keys a tile, number of K/V buffers), chosen to fill the shared memory
TILES = {64: (128, 4), 128: (128, 3), 256: (64, 2)}
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


@gluon.jit
def _tile(work, cu_seqlens, seq_lens, t, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PACKED: gl.constexpr):
    """Row, first packed query, head slot, first token, new tokens, keys and K/V tiles of work item `t`."""
    b = gl.load(work + t * 4)
    first_query = gl.load(work + t * 4 + 1)
    slot = gl.load(work + t * 4 + 2)
    first_token = gl.load(cu_seqlens + b)
    new = gl.load(cu_seqlens + b + 1) - first_token
    length = gl.load(seq_lens + b)
    seen = gl.minimum(length, first_query // PACKED + BLOCK_M // PACKED + length - new)
    return b, first_query, slot, first_token, new, length, gl.maximum((seen + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _lists(visited, t, SLOTS: gl.constexpr, LISTS: gl.constexpr):
    """Of work item `t` the list of K/V tiles, how many are seen wholly and in part, and its length in memory."""
    counts, tiles, columns = visited
    item = t if LISTS > 1 else t // SLOTS
    return tiles + item.to(gl.int64) * columns, gl.load(counts + item * 2), gl.load(counts + item * 2 + 1), columns


@gluon.jit
def _listed_key(lists, j):
    """The first key of the `j`-th tile of `_lists`: those seen in part come first, the last of the row at their head."""
    listed, whole, partly, columns = lists
    at = gl.where(j < partly, columns - partly + j, j - partly)
    return gl.load(listed + at, mask=whole + partly > 0, other=0)


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
    tiles, stride_table, groups, ratio, beyond = numbers
    BLOCK_M: gl.constexpr = CFG[0]
    BLOCK_N: gl.constexpr = CFG[1]
    D: gl.constexpr = CFG[2]
    BUFFERS: gl.constexpr = CFG[3]
    PAGE: gl.constexpr = CFG[4]
    HEADS_FIRST: gl.constexpr = CFG[5]
    PACKED: gl.constexpr = CFG[6]
    done = 0
    q_phase = 1
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, first_query, slot, first_token, new, length, count = _tile(
            work, cu_seqlens, seq_lens, t, BLOCK_M, BLOCK_N, PACKED
        )
        head = slot * PACKED // ratio
        table = page_table + b * stride_table
        pages = (length + PAGE - 1) // PAGE
        if LISTS > 0:
            lists = _lists(visited, t, groups * ratio // PACKED, LISTS)
            count = gl.maximum(lists[1] + lists[2], 1)
            first_key = _listed_key(lists, 0) * BLOCK_N
        s = done % BUFFERS
        mbarrier.wait(kv_empty.index(s), ((done // BUFFERS) & 1) ^ 1)
        if LISTS == 0:
            first_key = (count - 1) * BLOCK_N
        _load_pages(
            k_desc, k_full.index(s), k_s.index(s), table, first_key, pages, head, groups, beyond,
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
                first_key = _listed_key(lists, j) * BLOCK_N
            s = done % BUFFERS
            mbarrier.wait(kv_empty.index(s), ((done // BUFFERS) & 1) ^ 1)
            if LISTS == 0:
                first_key = (count - 1 - j) * BLOCK_N
            _load_pages(
                k_desc, k_full.index(s), k_s.index(s), table, first_key, pages, head, groups, beyond,
                PAGE, BLOCK_N, D, HEADS_FIRST,
            )  # fmt: skip
            s = (done - 1) % BUFFERS
            if LISTS == 0:
                key_before = (count - j) * BLOCK_N
            _load_pages(
                v_desc, v_full.index(s), v_s.index(s), table, key_before, pages, head, groups, beyond,
                PAGE, BLOCK_N, D, HEADS_FIRST,
            )  # fmt: skip
            done += 1
        s = (done - 1) % BUFFERS
        _load_pages(
            v_desc, v_full.index(s), v_s.index(s), table, first_key if LISTS > 0 else 0, pages, head, groups, beyond,
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
def _softmax(
    scores, row_max, scale, last_key, first_key, pairs,
    LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, MASK: gl.constexpr, HOOKS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over scores `[64, BLOCK_N]`, in base 2.

    `pairs` is what a variant's functions get: row, query heads `[64]`, positions `[64]`, window and tensors.

    Returns:
        Weights `[64, BLOCK_N]`, the factor for the sums so far `[64]`, and the new maximum `[64]`.
    """
    b, h, q_idx, window, tensors = pairs
    if HOOKS.score_mod is not None:
        key = gl.expand_dims(first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)), 0)
        scores = HOOKS.score_mod(scores * scale, b, gl.expand_dims(h, 1), gl.expand_dims(q_idx, 1), key, tensors)
        scale = LOG2E
    if MASK and HOOKS.mask_mod is not None:
        key = gl.expand_dims(first_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)), 0)
        seen = HOOKS.mask_mod(b, gl.expand_dims(h, 1), gl.expand_dims(q_idx, 1), key, tensors)
        scores = gl.where(seen, scores, float("-inf"))
    if MASK and window is not None:
        column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        outside = gl.expand_dims(column, 0) <= gl.expand_dims(q_idx - window - first_key, 1)
        scores = gl.where(outside, float("-inf"), scores)
    if MASK:
        column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        scores = gl.where(gl.expand_dims(column, 0) <= gl.expand_dims(last_key - first_key, 1), scores, float("-inf"))
    if HOOKS.sigmoid:
        # Added up as they are.
        weights = 1.0 / (1.0 + gl.exp2(-(scores * scale)))
        new_max = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, LAYOUT))
        return weights, new_max + 1.0, new_max
    else:
        new_max = gl.maximum(row_max, row_maxima(scores, LAYOUT) * scale)
        if MASK:
            # Without this, a query that has seen no key yet would give -inf - -inf = NaN.
            shift = gl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            shift = new_max
        weights = gl.exp2(scores * scale - gl.expand_dims(shift, 1))
        return weights, gl.exp2(row_max - shift), new_max


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
    scores = warpgroup_mma_wait(1, deps=(scores,))
    new, decay, row_max = _softmax(scores, row_max, scale, last_key, first_key, pairs, S_LAYOUT, BLOCK_N, MASK, HOOKS)
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
def _consumer(
    WARPGROUP: gl.constexpr, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors,
    CFG: gl.constexpr, LISTS: gl.constexpr, HOOKS: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 packed query rows of each tile."""
    q_all, k_s, v_s = buffers
    q_full, q_empty, k_full, v_full, kv_empty = bars
    work, page_table, cu_seqlens, seq_lens = pointers
    tiles, stride_table, groups, ratio, beyond = numbers
    BLOCK_M: gl.constexpr = CFG[0]
    BLOCK_N: gl.constexpr = CFG[1]
    D: gl.constexpr = CFG[2]
    BUFFERS: gl.constexpr = CFG[3]
    PACKED: gl.constexpr = CFG[6]
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
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, first_query, slot, first_token, new, length, count = _tile(
            work, cu_seqlens, seq_lens, t, BLOCK_M, BLOCK_N, PACKED
        )
        mine = first_query + WARPGROUP * 64
        query = mine + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))  # [64]
        q_idx = query // PACKED + (length - new)
        last_key = gl.minimum(q_idx, length - 1)
        pairs = (b, slot * PACKED + query % PACKED, q_idx, window, tensors)
        if LISTS > 0:
            lists = _lists(visited, t, heads // PACKED, LISTS)
            count = gl.maximum(lists[1] + lists[2], 1)
            masked = gl.maximum(lists[2], 1)
            first_key = _listed_key(lists, 0) * BLOCK_N
            if not HOOKS.causal:
                last_key = length - 1 + query * 0
        else:
            # Tiles of keys that every query sees, and that end before the row does, need no mask.
            unmasked = gl.minimum(length, gl.maximum(first_query // PACKED + length - new + 1, 0)) // BLOCK_N
            masked = gl.maximum(count - unmasked, 1)
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
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if LISTS == 0:
            first_key = (count - 1) * BLOCK_N
        weights, decay, row_max = _softmax(
            scores, row_max, scale, last_key, first_key, pairs, S_LAYOUT, BLOCK_N, True, HOOKS
        )
        row_sum = partial_row_sums(weights)
        packed = pack_pairs(weights, dtype)
        if first_key + BLOCK_N > length:
            mbarrier.wait(v_full.index(stage), phase)
            _clear_tail(v_s.index(stage), length - first_key, BLOCK_N, D)
        for j in range(1, masked):
            key = _listed_key(lists, j) * BLOCK_N if LISTS > 0 else (count - 1 - j) * BLOCK_N
            acc, packed, row_max, row_sum = _step(
                acc, packed, row_max, row_sum, done + j, key, q_s, k_s, v_s, bars, scale, last_key, pairs,
                WARPGROUP, CFG, True, HOOKS,
            )  # fmt: skip
        packed = copy_registers(packed)
        for j in range(masked, count):
            key = _listed_key(lists, j) * BLOCK_N if LISTS > 0 else (count - 1 - j) * BLOCK_N
            acc, packed, row_max, row_sum = _step(
                acc, packed, row_max, row_sum, done + j, key, q_s, k_s, v_s, bars, scale, last_key, pairs,
                WARPGROUP, CFG, False, HOOKS,
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
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, work, page_table, cu_seqlens, seq_lens, tiles_ptr,
    stride_table, groups, ratio, beyond, scale, visited, window, tensors,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, BUFFERS: gl.constexpr, PAGE: gl.constexpr,
    HEADS_FIRST: gl.constexpr, PACKED: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    LISTS: gl.constexpr, HOOKS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and the three roles: two consumer warpgroups and a producer warp.

    `visited` is a `Visited` of LISTS lists an item, or None; `window` is None without one.
    """
    CFG: gl.constexpr = (BLOCK_M, BLOCK_N, D, BUFFERS, PAGE, HEADS_FIRST, PACKED)
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
    numbers = (gl.load(tiles_ptr), stride_table, groups, ratio, beyond)
    gl.warp_specialize([
        (_consumer, (
            0, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors, CFG, LISTS, HOOKS
        )),
        (_consumer, (
            1, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors, CFG, LISTS, HOOKS
        )),
        (_producer, ((q_desc, k_desc, v_desc), buffers, bars, pointers, numbers, visited, CFG, LISTS)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def heads_first(pages: Tensor) -> bool | None:
    """Whether `pages: [N, P, G, D]` lie in memory as `[N, G, P, D]`; None if in neither order without gaps."""
    if pages.is_contiguous():
        return False
    return True if pages.transpose(1, 2).is_contiguous() else None


def packed_heads(ratio: int) -> int:
    """Query heads that are packed with each token into the rows of a tile."""
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
    pages, page, groups = k_pages.shape[:3]
    ratio, order = heads // groups, heads_first(k_pages)
    packed = packed_heads(ratio)
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
    rows = pages * page * (groups if order else 1)
    flat = [(x.transpose(1, 2) if order else x).view(rows, -1) for x in (k_pages, v_pages)]
    q_box, kv_box = [BLOCK_M // 2 // packed, packed, dim], [min(page, block_n), dim]
    q_layout, kv_layout = (_layout(tuple(box), q.dtype) for box in (q_box, kv_box))
    q_desc = TensorDescriptor(q, list(q.shape), list(q.stride()), q_box, q_layout)
    k_desc, v_desc = (TensorDescriptor.from_tensor(x, kv_box, kv_layout) for x in flat)
    with on_device_of(q):
        prepared(hopper_prefill_kernel)[(min(work.shape[0], processors),)](
            q_desc, k_desc, v_desc, out, lse, work, page_table, cu_seqlens_q, seq_lens, tiles,
            page_table.stride(0), groups, ratio, rows, factor,
            None if visited is None else visited.for_kernel(), window, variant.tensors,
            BLOCK_M=BLOCK_M, BLOCK_N=block_n, D=dim, BUFFERS=buffers, PAGE=page, HEADS_FIRST=bool(order), PACKED=packed,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            LISTS=0 if visited is None else visited.counts.shape[1], HOOKS=hooks, num_warps=4, maxnreg=168,
            ptx_options=ASSEMBLER_OPTIONS,
        )  # fmt: skip
    return out, lse
