"""The experts of many tokens on Hopper, in Gluon: TMA, asynchronous matrix products, specialised warps.

A program is a producer warp, which loads 128 rows of pairs and 256 weight rows at a time, 64 columns of each, and two
consumer warpgroups of 64 pairs each, all weight rows: 128 of gate and as many of up, so that a thread has both of an output
and multiplies `silu(gate) * up` in its registers; or 256 of down. Programs are persistent and take their tiles from the work
list of `work_list.py`, so the host reads nothing back. The tiles of an expert that share weight rows are neighbours, so
that these are read from memory once. A warpgroup without pairs (few, or the last of an expert) leaves the matrix unit to
the other. Producer, consumers and launcher agree on barriers and shared memory line by line, and so stand in one file.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_fastattn.kernels.experts.checks import check_down, check_gate_up
from hf_fastattn.kernels.experts.grouped import combine
from hf_fastattn.kernels.experts.hopper_tiles import store_rows, work_item
from hf_fastattn.kernels.experts.hopper_wide import hopper_wide_kernel
from hf_fastattn.kernels.experts.routing import Routing
from hf_fastattn.kernels.experts.work_list import WorkList
from hf_fastattn.kernels.gluon_spelling import load_box
from hf_fastattn.kernels.launch import ASSEMBLER_OPTIONS, on_device_of
from hf_fastattn.kernels.layer.configs import PROCESSORS
from hf_fastattn.kernels.rehearsal import prepared

# Pairs a tile, weight rows of a box (two boxes a tile), columns a step, and steps that are loaded ahead.
BLOCK_M, BLOCK_N, BLOCK_K, BUFFERS = 128, 128, 64, 4
# Tiles of pairs of one expert that are neighbours before the next weight rows.
GROUP = 16
# Of tiles of 192 pairs: pairs, steps that have a buffer, registers of a consumer, and the pairs an expert, on average, of
# which they are quicker, as measured on an H200.
WIDE_M, WIDE_BUFFERS, WIDE_REGISTERS, WIDE_PAIRS = 192, 3, 160, range(112, 177)
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


@gluon.jit
def _load_tiles(x_desc, w_desc, buffers, bars, work, tiles, CFG: gl.constexpr):
    """The producer warp: a step of pairs and of both boxes of weight rows at a time."""
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
            load_box(w_desc, [row, k * BLOCK_K], full.index(s), w_s.index(s).slice(0, BLOCK_N, 0))
            load_box(w_desc, [other, k * BLOCK_K], full.index(s), w_s.index(s).slice(BLOCK_N, BLOCK_N, 0))
            load_box(x_desc, [place, k * BLOCK_K], full.index(s), x_s.index(s))
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
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    y_s = y_all.index(WARPGROUP)
    m = gl.arange(0, 64, gl.SliceLayout(1, STORE))
    done = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, n, place, size = work_item(work, t, TILES_N, GROUP, BLOCK_M)
        mine = size - WARPGROUP * 64
        if mine > 0:
            acc = gl.zeros([64, 2 * BLOCK_N], gl.float32, LAYOUT)
            s = done % BUFFERS
            mbarrier.wait(full.index(s), (done // BUFFERS) & 1)
            # [64, BLOCK_K] times [BLOCK_K, 2 * BLOCK_N]
            x = x_s.index(s).slice(WARPGROUP * 64, 64, 0)
            acc = warpgroup_mma(x, w_s.index(s).permute((1, 0)), acc, use_acc=False, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            for k in range(1, STEPS):
                s = (done + k) % BUFFERS
                mbarrier.wait(full.index(s), ((done + k) // BUFFERS) & 1)
                x = x_s.index(s).slice(WARPGROUP * 64, 64, 0)
                acc = warpgroup_mma(x, w_s.index(s).permute((1, 0)), acc, is_async=True)
                # The product of the step before is complete, and its buffers are free.
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((done + k - 1) % BUFFERS), count=1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((done + STEPS - 1) % BUFFERS), count=1)
            first, last = gl.split(acc.reshape([64, 2, BLOCK_N]).permute((0, 2, 1)))
            first = gl.convert_layout(first, HALF, assert_trivial=True)
            last = gl.convert_layout(last, HALF, assert_trivial=True)
            place += WARPGROUP * 64
            if GATED:
                y = first / (1.0 + gl.exp(-first)) * last
                store_rows(y, y_s, y_ptr, place + m, m < mine, n * BLOCK_N, ROWS, STORE)
            else:
                pair = gl.load(order_ptr + place + m, mask=m < mine, other=0)
                inside = gl.arange(0, 64, gl.SliceLayout(1, HALF))
                numbers = gl.load(order_ptr + place + inside, mask=inside < mine, other=0)
                weight = gl.expand_dims(gl.load(weights_ptr + numbers, mask=inside < mine, other=0.0), 1)
                store_rows(first * weight, y_s, y_ptr, pair, m < mine, n * (2 * BLOCK_N), ROWS, STORE)
                store_rows(last * weight, y_s, y_ptr, pair, m < mine, n * (2 * BLOCK_N) + BLOCK_N, ROWS, STORE)
        else:
            for k in range(STEPS):
                s = (done + k) % BUFFERS
                mbarrier.wait(full.index(s), ((done + k) // BUFFERS) & 1)
                mbarrier.arrive(empty.index(s), count=1)
        done += STEPS


@gluon.jit
def hopper_grouped_kernel(
    x_desc, w_desc, y_ptr, work, count_ptr, order_ptr, weights_ptr,
    ROWS: gl.constexpr, STEPS: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, BUFFERS: gl.constexpr, GROUP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and the three roles: two consumer warpgroups and a producer warp."""
    TILE: gl.constexpr = BLOCK_N if GATED else 2 * BLOCK_N
    TILES_N: gl.constexpr = (ROWS + TILE - 1) // TILE
    CFG: gl.constexpr = (ROWS, STEPS, GATED, BLOCK_M, BLOCK_N, BLOCK_K, BUFFERS, TILES_N, GROUP)
    dtype: gl.constexpr = x_desc.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * BLOCK_N, BLOCK_K], dtype)
    Y_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_N], dtype)
    x_s = gl.allocate_shared_memory(dtype, [BUFFERS, BLOCK_M, BLOCK_K], x_desc.layout)
    w_s = gl.allocate_shared_memory(dtype, [BUFFERS, 2 * BLOCK_N, BLOCK_K], LAYOUT)
    y_s = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_N], Y_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    buffers = (x_s, w_s, y_s)
    bars = (full, empty)
    tiles = gl.load(count_ptr) * TILES_N
    gl.warp_specialize([
        (_multiply_tiles, (0, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_multiply_tiles, (1, buffers, bars, work, tiles, y_ptr, order_ptr, weights_ptr, CFG)),
        (_load_tiles, (x_desc, w_desc, buffers, bars, work, tiles, CFG)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@functools.cache
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory; kept, since making it takes the host as long as a launch."""
    return gl.NVMMASharedLayout.get_default_for(list(box), DTYPES[dtype])


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _product(
    x: Tensor, weight: Tensor, routing: Routing, work: WorkList, gated: bool, programs: int | None
) -> Tensor:  # fmt: skip
    """`x: [T * K, columns]`, sorted, times the weights `[E, rows, columns]` of the experts."""
    experts, rows, width = weight.shape
    rows = rows // 2 if gated else rows
    y = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    wide = work.block_m == WIDE_M
    x_box, w_box = [64 if wide else BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
    x_desc = TensorDescriptor.from_tensor(x, x_box, _layout(tuple(x_box), x.dtype))
    w_desc = TensorDescriptor.from_tensor(weight.view(-1, width), w_box, _layout(tuple(w_box), x.dtype))
    tiles = work.tiles.shape[0] * -(-rows // (BLOCK_N if gated else 2 * BLOCK_N))
    grid = (min(tiles, programs or _processors(x.device)),)
    given = (x_desc, w_desc, y, work.tiles, work.tile_count, work.order, routing.weights)
    options: dict[str, Any] = {
        "ROWS": rows, "STEPS": -(-width // BLOCK_K), "GATED": gated, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "GROUP": GROUP,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS, "num_warps": 4, "ptx_options": ASSEMBLER_OPTIONS,
    }  # fmt: skip
    with on_device_of(x):
        if wide:
            prepared(hopper_wide_kernel)[grid](
                *given, x.shape[0], **options, BLOCK_M=WIDE_M, BUFFERS=WIDE_BUFFERS, CONSUMER_REGISTERS=WIDE_REGISTERS,
                maxnreg=128,
            )  # fmt: skip
        else:
            prepared(hopper_grouped_kernel)[grid](
                *given, **options, BLOCK_M=BLOCK_M, BUFFERS=BUFFERS, CONSUMER_REGISTERS=CONSUMER_REGISTERS, maxnreg=168
            )
    return y


def pairs_a_tile(pairs: int, experts: int) -> int:
    """Pairs of a token and an expert that a tile should have."""
    return WIDE_M if pairs // experts in WIDE_PAIRS else BLOCK_M


def why_not_hopper(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    """Why these kernels cannot take a call; None if they can. The caller checks the device and the version of Triton."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    widths = gate_up_proj.shape[2], down_proj.shape[2]
    if any(width % 8 for width in widths) or any(weight.data_ptr() % 16 for weight in (gate_up_proj, down_proj)):
        return f"rows of {widths[0]} and {widths[1]} columns, or addresses, that TMA cannot follow"
    return None


def gate_up_silu(
    rows: Tensor, work: WorkList, routing: Routing, gate_up_proj: Tensor, *, programs: int | None = None
) -> Tensor:
    """`silu(gate) * up` of every pair, `[T * K, I]`, in sorted order.

    Args:
        rows: `[T * K, H]` and the list, of `sort_rows` with tiles of `pairs_a_tile`.
        gate_up_proj: `[E, 2 I, H]`, contiguous, bf16 or fp16, as x.
        programs: at most so many; by default one a multiprocessor.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    check_gate_up(rows, None, gate_up_proj)
    return _product(rows, gate_up_proj, routing, work, True, programs)


def down_sum(
    states: Tensor,
    work: WorkList,
    routing: Routing,
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
