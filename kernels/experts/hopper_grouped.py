"""The experts of many tokens on Hopper, in Gluon: TMA, asynchronous matrix products, specialised warps.

A program is a producer warpgroup, which loads 192 rows of pairs and 256 weight rows at a time, 64 columns of each, and three
consumer warpgroups of 64 pairs each, all weight rows: 128 of gate and as many of up, so that a thread has both of an output
and multiplies `silu(gate) * up` in its registers; or 256 of down. What such products are limited by is the reading of tiles
from the second-level cache, so the tiles are the largest that registers hold, and pairs that an expert does not have
are not read. Rows of x are gathered on the way, 16 bytes a thread; rows of the states between the products lie in order,
and come by TMA, as the weights do. Programs are persistent and take their tiles from the work list of `expert_tiles.py`,
so the host reads nothing back. The tiles of an expert that share weight rows are neighbours, so that these are read from
memory once. A warpgroup without pairs (few, or the last of an expert) leaves the matrix unit to the others. Producer,
consumers and launcher agree on barriers and shared memory line by line, and so stand in one file.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_fastattn.kernels.experts.checks import check_down, check_gate_up
from hf_fastattn.kernels.experts.expert_tiles import ExpertTiles
from hf_fastattn.kernels.experts.grouped import combine
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.gluon_spelling import copy_rows, load_box
from hf_fastattn.kernels.launch import ASSEMBLER_OPTIONS, on_device_of
from hf_fastattn.kernels.layer.configs import PROCESSORS

# Pairs a tile, weight rows of a box (two boxes a tile), columns a step, and steps that have a buffer.
BLOCK_M, BLOCK_N, BLOCK_K, BUFFERS = 192, 128, 64, 3
# Tiles of pairs of one expert that are neighbours before the next weight rows.
GROUP = 16
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 160, 24


@gluon.jit
def _work_item(work, t, TILES_N: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr):
    """Expert, number of the weight rows, first pair and pairs of work item `t`."""
    entry = work + t // TILES_N * 4
    expert = gl.load(entry)
    inside = t - gl.load(entry + 1) * TILES_N
    count = gl.load(entry + 3)
    # A group of tiles of pairs with the first weight rows, then the same with the next ones.
    first = inside // (GROUP * TILES_N) * GROUP
    inside -= first * TILES_N
    width = gl.minimum((count + BLOCK_M - 1) // BLOCK_M - first, GROUP)
    n = inside // width
    m = (first + inside - n * width) * BLOCK_M
    return expert, n, gl.load(entry + 2) + m, gl.minimum(count - m, BLOCK_M)


@gluon.jit
def _gather(x_ptr, rows, size, k, eighth, buffer, WIDTH: gl.constexpr, BLOCK_K: gl.constexpr, LOAD: gl.constexpr):
    """Columns from k on of rows of x, `[64, BLOCK_K]`, asynchronously; zeros behind `size` rows and WIDTH columns."""
    m = gl.arange(0, 64, gl.SliceLayout(1, LOAD))
    column = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LOAD))
    pointers = x_ptr + gl.expand_dims(rows.to(gl.int64) * (eighth * 8), 1) + gl.expand_dims(column, 0)
    copy_rows(buffer, pointers, mask=gl.expand_dims(m < size, 1) & gl.expand_dims(column < WIDTH, 0))


@gluon.jit
def _load_tiles(x, w_desc, buffers, rows_s, bars, work, order_ptr, tiles, number, CFG: gl.constexpr):
    """The producer warpgroup: a step of pairs and of both boxes of weight rows at a time.

    Args:
        x: pointer to x if GATED, else the descriptor of the states.
        rows_s: room for the rows of x of a tile's pairs.
        number: the stride of x in eights of elements if GATED, so that the compiler knows what it is a multiple of; else how
            many rows the states have: where an expert has no more pairs, TMA is sent there, past the last of all. It
            writes zeros and reads nothing.
    """
    x_s, w_s, _ = buffers
    full, empty = bars
    ROWS: gl.constexpr = CFG[0]
    WIDTH: gl.constexpr = CFG[1]
    GATED: gl.constexpr = CFG[2]
    BLOCK_M: gl.constexpr = CFG[3]
    BLOCK_N: gl.constexpr = CFG[4]
    BLOCK_K: gl.constexpr = CFG[5]
    BUFFERS: gl.constexpr = CFG[6]
    TILES_N: gl.constexpr = CFG[7]
    GROUP: gl.constexpr = CFG[8]
    K: gl.constexpr = CFG[9]
    BLOCKS: gl.constexpr = BLOCK_M // 64
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m = gl.arange(0, 64, gl.SliceLayout(1, LOAD))
    done = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, n, place, size = _work_item(work, t, TILES_N, GROUP, BLOCK_M)
        if GATED:
            row = expert * (2 * ROWS) + n * BLOCK_N
            other = row + ROWS
            for w in gl.static_range(BLOCKS):
                pair = gl.load(order_ptr + place + w * 64 + m, mask=m < size - w * 64, other=0)
                rows_s.index(w).store(pair // K)
        else:
            row = expert * ROWS + n * (2 * BLOCK_N)
            other = row + BLOCK_N
        for k in range(0, WIDTH, BLOCK_K):
            s = done % BUFFERS
            mbarrier.wait(empty.index(s), ((done // BUFFERS) & 1) ^ 1)
            if GATED:
                mbarrier.expect(full.index(s), 2 * BLOCK_N * BLOCK_K * 2)
            else:
                mbarrier.expect(full.index(s), (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * 2)
            load_box(w_desc, [row, k], full.index(s), w_s.index(2 * s))
            load_box(w_desc, [other, k], full.index(s), w_s.index(2 * s + 1))
            for w in gl.static_range(BLOCKS):
                buffer = x_s.index(s * BLOCKS + w)
                if GATED:
                    rows = rows_s.index(w).load(gl.SliceLayout(1, LOAD))
                    _gather(x, rows, size - w * 64, k, number, buffer, WIDTH, BLOCK_K, LOAD)
                else:
                    load_box(x, [gl.where(w * 64 < size, place + w * 64, number), k], full.index(s), buffer)
            if GATED:
                # Each thread arrives when its copies have.
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            done += 1


@gluon.jit
def _store_rows(y, y_s, y_ptr, row, inside, first, ROWS: gl.constexpr, STORE: gl.constexpr):
    """`y: [64, BLOCK_N]` to columns from `first` on of the rows `row: [64]`, through shared memory, 16 bytes a thread."""
    y_s.store(y.to(y_s.dtype))
    y = y_s.load(STORE)
    column = first + gl.arange(0, y.shape[1], gl.SliceLayout(0, STORE))
    to = y_ptr + gl.expand_dims(row.to(gl.int64) * ROWS, 1) + gl.expand_dims(column, 0)
    gl.store(to, y, mask=gl.expand_dims(inside, 1) & gl.expand_dims(column < ROWS, 0))


@gluon.jit
def _multiply_tiles(WARPGROUP: gl.constexpr, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG: gl.constexpr):
    """A consumer warpgroup: 64 pairs of each tile, all its weight rows."""
    x_s, w_s, y_all = buffers
    full, empty = bars
    ROWS: gl.constexpr = CFG[0]
    GATED: gl.constexpr = CFG[2]
    BLOCK_M: gl.constexpr = CFG[3]
    BLOCK_N: gl.constexpr = CFG[4]
    STEPS: gl.constexpr = (CFG[1] + CFG[5] - 1) // CFG[5]
    BUFFERS: gl.constexpr = CFG[6]
    TILES_N: gl.constexpr = CFG[7]
    GROUP: gl.constexpr = CFG[8]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    y_s = y_all.index(WARPGROUP)
    m = gl.arange(0, 64, gl.SliceLayout(1, STORE))
    done = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, n, place, size = _work_item(work, t, TILES_N, GROUP, BLOCK_M)
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
                if GATED:
                    # The matrix unit reads past what other threads have copied, without this.
                    fence_async_shared()
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
                _store_rows(y, y_s, y_ptr, place + m, m < mine, n * BLOCK_N, ROWS, STORE)
            else:
                _store_rows(first * weight, y_s, y_ptr, pair, m < mine, n * (2 * BLOCK_N), ROWS, STORE)
                _store_rows(last * weight, y_s, y_ptr, pair, m < mine, n * (2 * BLOCK_N) + BLOCK_N, ROWS, STORE)
        else:
            for k in range(STEPS):
                s = (done + k) % BUFFERS
                mbarrier.wait(full.index(s), ((done + k) // BUFFERS) & 1)
                mbarrier.arrive(empty.index(s), count=1)
        done += STEPS


@gluon.jit(do_not_specialize=["number"])
def hopper_grouped_kernel(
    x, w_desc, y_ptr, work, count_ptr, order_ptr, weights_ptr, number,
    ROWS: gl.constexpr, WIDTH: gl.constexpr, K: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and the roles: three consumer warpgroups and a producer, whose `x` and `number` these are."""
    TILE: gl.constexpr = BLOCK_N if GATED else 2 * BLOCK_N
    TILES_N: gl.constexpr = (ROWS + TILE - 1) // TILE
    CFG: gl.constexpr = (ROWS, WIDTH, GATED, BLOCK_M, BLOCK_N, BLOCK_K, BUFFERS, TILES_N, GROUP, K)
    dtype: gl.constexpr = w_desc.dtype
    X_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_K], dtype)
    Y_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_N], dtype)
    x_s = gl.allocate_shared_memory(dtype, [BUFFERS * (BLOCK_M // 64), 64, BLOCK_K], X_LAYOUT)
    w_s = gl.allocate_shared_memory(dtype, [2 * BUFFERS, BLOCK_N, BLOCK_K], w_desc.layout)
    y_s = gl.allocate_shared_memory(dtype, [BLOCK_M // 64, 64, BLOCK_N], Y_LAYOUT)
    rows_s = gl.allocate_shared_memory(gl.int32, [BLOCK_M // 64, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        # What waits for TMA arrives once, and so does each thread that gathers.
        mbarrier.init(full.index(i), count=129 if GATED else 1)
        mbarrier.init(empty.index(i), count=BLOCK_M // 64)
    buffers = (x_s, w_s, y_s)
    bars = (full, empty)
    tiles = gl.load(count_ptr) * TILES_N
    gl.warp_specialize([
        (_multiply_tiles, (0, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_multiply_tiles, (1, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_multiply_tiles, (2, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_load_tiles, (x, w_desc, buffers, rows_s, bars, work, order_ptr, tiles, number, CFG)),
    ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory; kept, since making it takes the host as long as a launch."""
    return gl.NVMMASharedLayout.get_default_for(list(box), DTYPES[dtype])


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _product(
    x: Tensor, weight: Tensor, routing: Routing, work: ExpertTiles, gated: bool, programs: int | None
) -> Tensor:  # fmt: skip
    """Rows of the pairs, of x if gated, else all of x, times the weights `[E, rows, columns]` of their experts."""
    experts, rows, width = weight.shape
    rows = rows // 2 if gated else rows
    y = torch.empty((work.order.shape[0], rows), dtype=x.dtype, device=x.device)
    layout = _layout((BLOCK_N, BLOCK_K), x.dtype)
    w_desc = TensorDescriptor.from_tensor(weight.view(-1, width), [BLOCK_N, BLOCK_K], layout)
    source = x if gated else TensorDescriptor.from_tensor(x, [64, BLOCK_K], _layout((64, BLOCK_K), x.dtype))
    number = x.stride(0) // 8 if gated else x.shape[0]
    tiles = work.tiles.shape[0] * -(-rows // (BLOCK_N if gated else 2 * BLOCK_N))
    with on_device_of(x):
        hopper_grouped_kernel[(min(tiles, programs or _processors(x.device)),)](
            source, w_desc, y, work.tiles, work.tile_count, work.order, routing.weights, number,
            ROWS=rows, WIDTH=width, K=routing.chosen.shape[1], GATED=gated, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K, BUFFERS=BUFFERS, GROUP=GROUP, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4, maxnreg=128, ptx_options=ASSEMBLER_OPTIONS,
        )  # fmt: skip
    return y


def why_not_hopper(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    """Why these kernels cannot take a call; None if they can. The caller checks the device and the version of Triton."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    widths = gate_up_proj.shape[2], down_proj.shape[2]
    if any(width % 8 for width in (*widths, x.stride(0))) or any(t.data_ptr() % 16 for t in (x, gate_up_proj, down_proj)):
        return f"rows of {widths[0]} and {widths[1]} columns, strides or addresses, that cannot be read 16 bytes at a time"
    return None


def gate_up_silu(
    x: Tensor, routing: Routing, work: ExpertTiles, gate_up_proj: Tensor, *, programs: int | None = None
) -> Tensor:
    """`silu(gate) * up` of every pair, `[T * K, I]`, in sorted order.

    Args:
        x: `[T, H]` bf16 or fp16; stride between rows and address are multiples of 16 bytes.
        routing: with `counts`.
        work: of `list_tiles` with tiles of BLOCK_M pairs.
        gate_up_proj: `[E, 2 I, H]`, contiguous, of the dtype of x.
        programs: at most so many; by default one a multiprocessor.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_gate_up(x, routing, gate_up_proj)
    return _product(x, gate_up_proj, routing, work, True, programs)


def down_sum(
    states: Tensor,
    routing: Routing,
    work: ExpertTiles,
    down_proj: Tensor,
    *,
    residual: Tensor | None = None,
    shared: Tensor | None = None,
    programs: int | None = None,
) -> Tensor:
    """The weighted sum over the experts of each token, `[T, H]`; the rest as of `grouped.down_sum`.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_down(states.view(*routing.chosen.shape, -1), routing, down_proj, residual, shared)
    products = _product(states, down_proj, routing, work, False, programs)
    return combine(products, routing, residual, shared)
