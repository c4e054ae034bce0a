"""The kernel of `hopper_grouped.py` with tiles of 192 pairs: three consumer warpgroups, with two products each.

Most experts of up to so many pairs have one tile then, and their weights are read once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from hf_fastattn.kernels.experts.hopper_tiles import store_rows, work_item
from hf_fastattn.kernels.gluon_spelling import load_box


@gluon.jit
def _load_tiles(x_desc, w_desc, buffers, bars, work, tiles, pairs, CFG: gl.constexpr):
    """The producer warp: a step of pairs and of both boxes of weight rows at a time.

    Where an expert has no more pairs, TMA is sent past the last of all: it writes zeros and reads nothing.
    """
    x_s, w_s, _ = buffers
    full, empty = bars
    ROWS: gl.constexpr = CFG[0]
    STEPS: gl.constexpr = CFG[1]
    GATED: gl.constexpr = CFG[2]
    BLOCK_M: gl.constexpr = CFG[3]
    BLOCK_N: gl.constexpr = CFG[4]
    BLOCK_K: gl.constexpr = CFG[5]
    BUFFERS: gl.constexpr = CFG[6]
    TILES_N: gl.constexpr = CFG[7]
    GROUP: gl.constexpr = CFG[8]
    done = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, n, place, size = work_item(work, t, TILES_N, GROUP, BLOCK_M)
        if GATED:
            row = expert * (2 * ROWS) + n * BLOCK_N
            other = row + ROWS
        else:
            row = expert * ROWS + n * (2 * BLOCK_N)
            other = row + BLOCK_N
        for k in range(STEPS):
            s = done % BUFFERS
            mbarrier.wait(empty.index(s), ((done // BUFFERS) & 1) ^ 1)
            mbarrier.expect(full.index(s), (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * 2)
            load_box(w_desc, [row, k * BLOCK_K], full.index(s), w_s.index(2 * s))
            load_box(w_desc, [other, k * BLOCK_K], full.index(s), w_s.index(2 * s + 1))
            for w in gl.static_range(BLOCK_M // 64):
                row_x = gl.where(w * 64 < size, place + w * 64, pairs)
                load_box(x_desc, [row_x, k * BLOCK_K], full.index(s), x_s.index(s * (BLOCK_M // 64) + w))
            done += 1


@gluon.jit
def _multiply_tiles(WARPGROUP: gl.constexpr, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG: gl.constexpr):
    """A consumer warpgroup: 64 pairs of each tile, all its weight rows."""
    x_s, w_s, y_all = buffers
    full, empty = bars
    ROWS: gl.constexpr = CFG[0]
    STEPS: gl.constexpr = CFG[1]
    GATED: gl.constexpr = CFG[2]
    BLOCK_M: gl.constexpr = CFG[3]
    BLOCK_N: gl.constexpr = CFG[4]
    BUFFERS: gl.constexpr = CFG[6]
    TILES_N: gl.constexpr = CFG[7]
    GROUP: gl.constexpr = CFG[8]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    y_s = y_all.index(WARPGROUP)
    m = gl.arange(0, 64, gl.SliceLayout(1, STORE))
    done = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, n, place, size = work_item(work, t, TILES_N, GROUP, BLOCK_M)
        mine = size - WARPGROUP * 64
        if mine > 0:
            place += WARPGROUP * 64
            if not GATED:
                # Long before they are needed.
                pair = gl.load(order_ptr + place + m, mask=m < mine, other=0)
                inside = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
                numbers = gl.load(order_ptr + place + inside, mask=inside < mine, other=0)
                weight = gl.expand_dims(gl.load(weights_ptr + numbers, mask=inside < mine, other=0.0), 1)
            first = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
            last = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
            for k in range(STEPS):
                s = (done + k) % BUFFERS
                mbarrier.wait(full.index(s), ((done + k) // BUFFERS) & 1)
                # [64, BLOCK_K] times [BLOCK_K, BLOCK_N]
                x = x_s.index(s * (BLOCK_M // 64) + WARPGROUP)
                first = warpgroup_mma(x, w_s.index(2 * s).permute((1, 0)), first, is_async=True)
                last = warpgroup_mma(x, w_s.index(2 * s + 1).permute((1, 0)), last, is_async=True)
                # The products of the step before are complete, and its buffers are free.
                first, last = warpgroup_mma_wait(2, deps=(first, last))
                mbarrier.arrive(empty.index((done + k + BUFFERS - 1) % BUFFERS), count=1, pred=k > 0)
            first, last = warpgroup_mma_wait(0, deps=(first, last))
            mbarrier.arrive(empty.index((done + STEPS - 1) % BUFFERS), count=1)
            if GATED:
                y = first / (1.0 + gl.exp(-first)) * last
                store_rows(y, y_s, y_ptr, place + m, m < mine, n * BLOCK_N, ROWS, STORE)
            else:
                store_rows(first * weight, y_s, y_ptr, pair, m < mine, n * (2 * BLOCK_N), ROWS, STORE)
                store_rows(last * weight, y_s, y_ptr, pair, m < mine, n * (2 * BLOCK_N) + BLOCK_N, ROWS, STORE)
        else:
            for k in range(STEPS):
                s = (done + k) % BUFFERS
                mbarrier.wait(full.index(s), ((done + k) // BUFFERS) & 1)
                mbarrier.arrive(empty.index(s), count=1)
        done += STEPS


@gluon.jit(do_not_specialize=["pairs"])
def hopper_wide_kernel(
    x_desc, w_desc, y_ptr, work, count_ptr, order_ptr, weights_ptr, pairs,
    ROWS: gl.constexpr, STEPS: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and the roles: a consumer warpgroup for 64 pairs each, and a producer warp."""
    TILE: gl.constexpr = BLOCK_N if GATED else 2 * BLOCK_N
    TILES_N: gl.constexpr = (ROWS + TILE - 1) // TILE
    CFG: gl.constexpr = (ROWS, STEPS, GATED, BLOCK_M, BLOCK_N, BLOCK_K, BUFFERS, TILES_N, GROUP)
    dtype: gl.constexpr = x_desc.dtype
    Y_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_N], dtype)
    x_s = gl.allocate_shared_memory(dtype, [BUFFERS * (BLOCK_M // 64), 64, BLOCK_K], x_desc.layout)
    w_s = gl.allocate_shared_memory(dtype, [2 * BUFFERS, BLOCK_N, BLOCK_K], w_desc.layout)
    y_s = gl.allocate_shared_memory(dtype, [BLOCK_M // 64, 64, BLOCK_N], Y_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=BLOCK_M // 64)
    buffers = (x_s, w_s, y_s)
    bars = (full, empty)
    tiles = gl.load(count_ptr) * TILES_N
    gl.warp_specialize([
        (_multiply_tiles, (0, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_multiply_tiles, (1, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_multiply_tiles, (2, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_load_tiles, (x_desc, w_desc, buffers, bars, work, tiles, pairs, CFG)),
    ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
