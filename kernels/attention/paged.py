"""Attention over pages with the Triton kernels: split-KV for a few new tokens a row, prefill for many."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_fastattn.kernels.attention.decode import paged_decode, tile_of_decode
from hf_fastattn.kernels.attention.prefill import paged_prefill, tile_of_prefill
from hf_fastattn.kernels.attention.visited import Visited, list_rows, list_tiles
from hf_fastattn.kernels.attention.work_list import WorkLists
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.variants.hooks import NO_HOOKS, PLAIN, CompiledVariant

# Up to this many packed query rows (new tokens * R) for each (row, kv head) the GPU is full only with the keys split.
MAX_SPLIT_QUERIES = 64
# Query rows of all heads for each SM: with fewer of them prefill leaves SMs idle, and splitting the keys pays too.
MIN_PREFILL_QUERIES = 64


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor | None,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    workspace: Workspace | None = None,
    hopper: bool = False,
    batch_invariant: bool = False,
    work_lists: WorkLists | None = None,
    variant: CompiledVariant = PLAIN,
    visited: Visited | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed queries over paged keys and values; see `paged_prefill` and `paged_decode`.

    Args:
        q: `[T, H, D]` queries after RoPE.
        k_pages: `[N, P, G, D]` pages of keys; `v_pages` of values, with the same strides.
        page_table: `[B, columns]` int32.
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin; None if every row has one.
        seq_lens: `[B]` int32, keys of each row after the append.
        max_query_len: the most new tokens of a row, known on the host.
        scale: factor on the scores.
        window: keys a query sees, itself included; all by default.
        softcap: scores become `softcap * tanh(score / softcap)`.
        workspace: room for partial states, for one stream; a new one by default.
        hopper: take the Gluon kernel where it can; see `backends.choose_backend`.
        batch_invariant: a row's output and LSE are bitwise the same whatever the other rows, the width of the page table
            and the places of the pages. A call with `cu_seqlens_q` need not equal one without.
        work_lists: those of earlier calls with the same `cu_seqlens_q`, for the Gluon kernel.
        variant: what attention does besides; the Gluon kernel takes none.
        visited: the tiles that its mask shows, of `visited_tiles` for the same arguments; without it all are visited.

    Returns:
        Output `[T, H, D]` in q's dtype and LSE `[T, H]` fp32, natural logarithm.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernels.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "batch_invariant": batch_invariant}
    options |= {"variant": variant, "visited": visited}
    workspace = workspace or Workspace(q.device)
    if cu_seqlens_q is not None and (batch_invariant or _fills_the_gpu(q, k_pages, max_query_len, workspace.processors)):
        batch = (page_table, cu_seqlens_q, seq_lens)
        if hopper and variant.hooks == NO_HOOKS:
            from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill, why_not_hopper

            if why_not_hopper(q, k_pages, variant.window_with(window), softcap) is None:
                processors = workspace.processors
                return hopper_prefill(q, k_pages, v_pages, *batch, scale=scale, processors=processors, work_lists=work_lists)
        return paged_prefill(q, k_pages, v_pages, *batch, **options)
    return paged_decode(
        q, k_pages, v_pages, page_table, seq_lens, **options,
        cu_seqlens_q=cu_seqlens_q, max_query_len=max_query_len, workspace=workspace,
    )  # fmt: skip


def visited_tiles(
    q: Tensor,
    k_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor | None,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    workspace: Workspace,
    variant: CompiledVariant,
    window: int | None = None,
    batch_invariant: bool = False,
) -> Visited | None:
    """The tiles of keys that `variant.mask_mod` shows, for `paged_attention`; None if it has no mask.

    It depends on the batch, the variant and the window, not on queries and keys: one serves all layers alike. Of `q` and
    `k_pages` only shapes and types are looked at.
    """
    if not variant.hides_tiles or not q.shape[0]:
        return None
    heads, most_keys = (q.shape[1], k_pages.shape[2]), page_table.shape[1] * k_pages.shape[1]
    options: dict[str, Any] = {"heads": heads, "most_keys": most_keys, "window": window}
    if cu_seqlens_q is not None and (batch_invariant or _fills_the_gpu(q, k_pages, max_query_len, workspace.processors)):
        tile = tile_of_prefill(q, k_pages, batch_invariant)
        options |= {"tokens": q.shape[0], "block_m": tile.block_m, "block_n": tile.block_n}
        return list_tiles(variant, cu_seqlens_q, seq_lens, **options)
    rows = seq_lens.shape[0]
    tile = tile_of_decode(q, k_pages, rows, max_query_len, workspace.processors, batch_invariant)
    options |= {"max_query_len": max_query_len, "block_n": tile.block_n}
    return list_rows(variant, cu_seqlens_q, seq_lens, **options)


def _fills_the_gpu(q: Tensor, k_pages: Tensor, max_query_len: int, processors: int) -> bool:
    """Whether there are enough queries for prefill tiles to fill the GPU without a split of the keys."""
    many = max_query_len * (q.shape[1] // k_pages.shape[2]) > MAX_SPLIT_QUERIES
    return many and q.shape[0] * q.shape[1] > processors * MIN_PREFILL_QUERIES
