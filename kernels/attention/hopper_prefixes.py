"""Attention over shared prefixes on Hopper, in Gluon: the queries of all rows that share a prefix are the rows of its tiles.

The kernel is that of `hopper_prefill.py`, with parts of prefixes for work items (`prefix_items.py`): matrix products bind a
prefix that many rows share, and that kernel runs them at about twice the rate of Triton's. It leaves the states of the parts
where `suffixes.py` looks for those of `shared_prefix.py`.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from hf_fastattn.kernels.attention.hopper_prefill import (
    BLOCK_M,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    TILES,
    descriptors,
    heads_first,
    hopper_prefill_kernel,
    packed_heads,
    why_not_hopper,
)
from hf_fastattn.kernels.attention.prefix_items import prefix_items
from hf_fastattn.kernels.attention.tile import score_factors
from hf_fastattn.kernels.attention.work_list import WorkLists
from hf_fastattn.kernels.launch import ASSEMBLER_OPTIONS, on_device_of
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import NO_HOOKS, PLAIN, CompiledVariant


def why_not_prefixes(q: Tensor, k_pages: Tensor, variant: CompiledVariant) -> str | None:
    """Why this kernel cannot take the prefixes of a call; None if it can."""
    # Sinks and transforms of the output are the merge's.
    if variant.hooks_for(q.dtype)._replace(sink=None, output_transform=None) != NO_HOOKS:
        return "functions of a variant"
    ratio = q.shape[1] // k_pages.shape[2]
    if packed_heads(ratio, PLAIN) != ratio:
        return f"{ratio} query heads a kv head"
    return why_not_hopper(q, k_pages, None, None)


def hopper_prefixes(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    group_starts: Tensor,
    prefix_lens: Tensor,
    partial: Tensor,
    partial_sum: Tensor,
    *,
    scale: float,
    programs: int,
    whole_base: int,
    work_lists: WorkLists,
) -> Tensor:
    """States of the queries over the prefixes of their rows; see `shared_prefix.paged_decode_shared` for what is not here.

    Args:
        q: `[B, H, D]` queries after RoPE, bf16 or fp16; D is 64, 128 or 256.
        k_pages: `[N, P, G, D]` pages of keys; `v_pages` of values.
        page_table: `[B, columns]` int32.
        seq_lens: `[B]` int32.
        group_starts: `[levels, groups + 1]` or `[groups + 1]` int32; `prefix_lens` `[levels, groups]` or `[groups]`.
        partial: `[states, D]` fp32, written: two blocks of BLOCK_M states for each program, then from `whole_base` on one
            state for each query of a level, for prefixes that are not split.
        partial_sum: `[states, 2]` fp32, written: maximum (base 2) and sum of the weights.
        scale: factor on the scores.
        programs: at most the multiprocessors of the GPU.
        whole_base: see `partial`.
        work_lists: of earlier launches for the same lengths and groups, as by other layers of a forward.

    Returns:
        `[B * G, PLACE]` int32; see `prefix_lists.PLACE`.

    Raises:
        ValueError: the kernel cannot take such queries or pages; see `why_not_prefixes`.
    """
    reason = why_not_prefixes(q, k_pages, PLAIN)
    if reason or scale <= 0:
        raise ValueError(f"the Hopper kernel cannot take {reason or f'scale={scale}'}; use hopper=False")
    heads, dim = q.shape[1:]
    page, kv_heads = k_pages.shape[1:3]
    ratio, order, (block_n, buffers) = heads // kv_heads, heads_first(k_pages), TILES[dim]
    key = ("prefixes", q.device, group_starts.data_ptr(), prefix_lens.shape, heads, kv_heads, block_n, programs, whole_base)
    if key not in work_lists:
        work_lists[key] = prefix_items(
            seq_lens, group_starts, prefix_lens, heads=(heads, kv_heads), programs=programs, block_m=BLOCK_M,
            block_n=block_n, whole_base=whole_base,
        )  # fmt: skip
    items, ranges, places = work_lists[key]
    q_desc, k_desc, v_desc, beyond = descriptors(q, k_pages, v_pages, ratio)
    factor, _ = score_factors(scale, None, NO_HOOKS)
    with on_device_of(q):
        prepared(hopper_prefill_kernel)[(programs,)](
            q_desc, k_desc, v_desc, partial, partial_sum, items, page_table, seq_lens, seq_lens, ranges,
            page_table.stride(0), kv_heads, ratio, beyond, factor, None, None, None,
            BLOCK_M=BLOCK_M, BLOCK_N=block_n, D=dim, BUFFERS=buffers, PAGE=page, HEADS_FIRST=bool(order), PACKED=ratio,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, LISTS=0, HOOKS=NO_HOOKS,
            DISTANCES=1, PREFIXES=True, num_warps=4, maxnreg=168, ptx_options=ASSEMBLER_OPTIONS,
            launch_pdl=True,
        )  # fmt: skip
    return cast(Tensor, places)
