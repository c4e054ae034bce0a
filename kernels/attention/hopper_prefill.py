"""Paged prefill and append on Hopper, in Gluon: TMA, asynchronous matrix products, specialised warps (`hopper_roles.py`).

The rows of a tile are (token, query head of the kv head), packed by a three-dimensional TMA box if R is a power of two; a
tile of K or V is filled by one box a page. Programs are persistent and take their tiles from a work list made on the device,
so a captured graph follows lengths that changed. The tiles of a row are taken from its end, so that the masked ones come
first. What depends on the distance of query and key alone is computed once a head and distance of a tile.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_fastattn.kernels.attention.hopper_items import items_of_program
from hf_fastattn.kernels.attention.hopper_registers import start_launch_behind, wait_for_launch_ahead
from hf_fastattn.kernels.attention.hopper_roles import consumer, producer
from hf_fastattn.kernels.attention.tile import score_factors
from hf_fastattn.kernels.attention.visited import Visited, check_visited, prefill_tiles
from hf_fastattn.kernels.attention.work_list import WorkLists, work_list
from hf_fastattn.kernels.launch import ASSEMBLER_OPTIONS, check_pages, on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import PLAIN, CompiledVariant

BLOCK_M = 128
# head dim -> (keys a tile, number of K/V buffers), chosen to fill the shared memory
TILES = {64: (128, 4), 128: (128, 3), 256: (64, 2)}
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


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
    stored are their states, not normalised. `visited` is a `Visited` of LISTS lists an item, or None; `window` is None
    without one.
    """
    if PREFIXES:
        # In this order: the launch behind reads what the launches ahead wrote, before it waits for this one.
        wait_for_launch_ahead()
        start_launch_behind()
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
        (consumer, (
            0, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors,
            CFG, LISTS, HOOKS
        )),
        (consumer, (
            1, buffers, bars, pointers, numbers, out_ptr, lse_ptr, scale, visited, window, tensors,
            CFG, LISTS, HOOKS
        )),
        (producer, ((q_desc, k_desc, v_desc), buffers, bars, pointers, numbers, visited, CFG, LISTS)),
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
    if variant.transforms_keys or hooks.query_transform is not None or hooks.output_transform is not None:
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
