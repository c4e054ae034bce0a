"""Attention over pages with the Triton kernels: split-KV for a few new tokens a row, prefill for many."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_fastattn.kernels.attention.decode import paged_decode
from hf_fastattn.kernels.attention.prefill import paged_prefill
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

    Returns:
        Output `[T, H, D]` in q's dtype and LSE `[T, H]` fp32, natural logarithm.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernels.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "batch_invariant": batch_invariant}
    options["variant"] = variant
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


def _fills_the_gpu(q: Tensor, k_pages: Tensor, max_query_len: int, processors: int) -> bool:
    """Whether there are enough queries for prefill tiles to fill the GPU without a split of the keys."""
    many = max_query_len * (q.shape[1] // k_pages.shape[2]) > MAX_SPLIT_QUERIES
    return many and q.shape[0] * q.shape[1] > processors * MIN_PREFILL_QUERIES
