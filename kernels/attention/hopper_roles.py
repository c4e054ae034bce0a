"""What the programs of the Gluon prefill do: a producer warp, and two consumer warpgroups of 64 packed query rows each.

The producer loads queries and, through the page table, K/V pages by TMA. A warpgroup issues the product with K of a tile
together with the product with V of the tile before; the two take turns on the tensor cores, so that the softmax of one
overlaps the products of the other ("FlashAttention-3", Shah et al., 2024). They agree on barriers line by line, and so stand
in one file.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_fastattn.kernels.attention.hopper_items import item_of, key_of, listed_tile, lists_of, tile_of
from hf_fastattn.kernels.attention.hopper_registers import (
    copy_registers,
    pack_pairs,
    partial_row_sums,
    schedule_fence,
    turn_pass,
    turn_wait,
    unpack_pairs,
)
from hf_fastattn.kernels.attention.hopper_shown import shown_bits
from hf_fastattn.kernels.attention.hopper_softmax import LOG2E, softmax_step, values_of_distances
from hf_fastattn.kernels.attention.prefix_items import ITEM
from hf_fastattn.kernels.attention.visited import number_of
from hf_fastattn.kernels.gluon_spelling import load_box, reinterpreted


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
def producer(descs, buffers, bars, pointers, numbers, visited, CFG: gl.constexpr, LISTS: gl.constexpr):
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
def _clear_tail(v, valid, BLOCK_N: gl.constexpr, D: gl.constexpr, LISTS: gl.constexpr):
    """Zero the rows of a V tile `[BLOCK_N, D]` from `valid` on: the rest of a page may hold NaN, and 0 * NaN is NaN.

    Both warpgroups do it, with the same values, so they need not wait for each other.
    """
    ROWS: gl.constexpr = 32
    # A tile lies in memory as panels of 64 columns, and these row after row.
    PANEL: gl.constexpr = 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PANEL], v.dtype)
    parts = reinterpreted(v, v.dtype, [D // PANEL * BLOCK_N // ROWS, ROWS, PANEL], SHARED)
    # With lists registers are short: rows that hold keys are written as they are, too.
    for c in range(0 if LISTS > 0 else gl.maximum(valid, 0) // ROWS, BLOCK_N // ROWS):
        row = c * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        for panel in gl.static_range(D // PANEL):
            part = parts.index(panel * (BLOCK_N // ROWS) + c)
            x = part.load(LAYOUT)  # [ROWS, PANEL]
            zero = gl.full([ROWS, PANEL], 0.0, v.dtype, LAYOUT)
            part.store(gl.where(gl.expand_dims(row < valid, 1), x, zero))
    fence_async_shared()


@gluon.jit
def _step(
    acc, packed, row_max, row_sum, done, first_key, q_s, k_s, v_s, bars, scale, last_key, pairs, masked,
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
    shown = shown_bits(first_key, last_key, pairs, True, CFG, S_LAYOUT, MASK, HOOKS)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    new, decay, row_max = softmax_step(
        scores, row_max, scale, last_key, first_key, pairs, by_distance, shown, masked, CFG, S_LAYOUT, BLOCK_N, MASK, HOOKS
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
def consumer(
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
        by_distance = values_of_distances(first_key, pairs, CFG, HOOKS)
        # Of most first tiles causality alone hides something, and masks may take memory to read.
        shown = shown_bits(first_key, last_key, pairs, hides, CFG, S_LAYOUT, 1, HOOKS)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        weights, decay, row_max = softmax_step(
            scores, row_max, scale, last_key, first_key, pairs, by_distance, shown, True, CFG, S_LAYOUT, BLOCK_N, 1, HOOKS
        )
        packed = pack_pairs(weights, dtype)
        row_sum = partial_row_sums(weights)
        if first_key + BLOCK_N > length:
            mbarrier.wait(v_full.index(stage), phase)
            _clear_tail(v_s.index(stage), length - first_key, BLOCK_N, D, LISTS)
        # With lists, tiles with a mask may be many, and have a loop of their own. Without, there are one or two more: one
        # loop, which asks of each tile whether it has a mask, compiles in three quarters of the time.
        together: gl.constexpr = LISTS == 0
        if not together:
            for j in range(1, gl.maximum(masked, 1)):
                key = key_of(listed, visited, j, count, masked, BLOCK_N, LISTS)
                acc, packed, row_max, row_sum = _step(
                    acc, packed, row_max, row_sum, done + j, key, q_s, k_s, v_s, bars, scale, last_key, pairs, True,
                    WARPGROUP, CFG, 1, HOOKS,
                )  # fmt: skip
            packed = copy_registers(packed)
        for j in range(1 if together else gl.maximum(masked, 1), count):
            key = key_of(listed, visited, j, count, masked, BLOCK_N, LISTS)
            acc, packed, row_max, row_sum = _step(
                acc, packed, row_max, row_sum, done + j, key, q_s, k_s, v_s, bars, scale, last_key, pairs, j < masked,
                WARPGROUP, CFG, 2 if together else 0, HOOKS,
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
