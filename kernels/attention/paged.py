"""Attention over pages with the Triton kernels: split-KV for a few new tokens a row, prefill for many."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_fastattn.kernels.attention.decode import decode_launch, paged_decode, tile_of_decode
from hf_fastattn.kernels.attention.prefill import paged_prefill, prefill_launch, tile_of_prefill
from hf_fastattn.kernels.attention.visited import Visited, list_rows, list_tiles
from hf_fastattn.kernels.attention.widened_pages import pays, widened_pages
from hf_fastattn.kernels.attention.work_list import WorkLists
from hf_fastattn.kernels.attention.workspace import Workspace
from hf_fastattn.kernels.page_formats import is_eight_bits
from hf_fastattn.kernels.relaunch import Launch
from hf_fastattn.kernels.variants.hooks import PLAIN, CompiledVariant

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
        k_pages: `[N, P, G, D]` pages of keys; `v_pages` of values, with the same strides. Of 8 bits those of
            `page_formats.page_views`: for many new tokens a copy of them in the dtype of q is read.
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
        work_lists: what earlier calls for the same batch have made, and this one adds to: the work of the Gluon kernel, and
            the tiles that a variant's mask shows. To be emptied before lengths change.
        variant: what attention does besides; the Gluon kernel takes none with transforms.
        visited: the tiles that its mask shows, of `visited_tiles` for the same arguments. Without it they are made if there
            are `work_lists` to keep them in; else all tiles are visited.

    Returns:
        Output `[T, H, D]` in q's dtype and LSE `[T, H]` fp32, natural logarithm.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernels.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "batch_invariant": batch_invariant}
    workspace = workspace or Workspace(q.device)
    if is_eight_bits(k_pages):
        # Whether the copy pays depends on other rows, and its numbers are rounded in other places.
        copied = not batch_invariant and cu_seqlens_q is not None and visited is None and pays(q, k_pages, page_table)
        if copied and _fills_the_gpu(q, k_pages, max_query_len, workspace.processors):
            k_pages, v_pages, page_table = widened_pages(k_pages, v_pages, page_table, seq_lens, q.dtype)
        hopper = hopper and not is_eight_bits(k_pages)
    if visited is None and work_lists is not None:
        visited = _remembered(
            work_lists, q, k_pages, page_table, cu_seqlens_q, seq_lens, max_query_len=max_query_len, workspace=workspace,
            variant=variant, window=window, softcap=softcap, hopper=hopper, batch_invariant=batch_invariant,
        )  # fmt: skip
    options |= {"variant": variant, "visited": visited}
    if cu_seqlens_q is not None and (batch_invariant or _fills_the_gpu(q, k_pages, max_query_len, workspace.processors)):
        batch = (page_table, cu_seqlens_q, seq_lens)
        if hopper and _hopper_takes(q, k_pages, variant, window, softcap, visited is not None):
            from hf_fastattn.kernels.attention.hopper_prefill import hopper_prefill

            return hopper_prefill(
                q, k_pages, v_pages, *batch, scale=scale, processors=workspace.processors, work_lists=work_lists,
                window=window, variant=variant, visited=visited,
            )  # fmt: skip
        return paged_prefill(q, k_pages, v_pages, *batch, **options)
    return paged_decode(
        q, k_pages, v_pages, page_table, seq_lens, **options,
        cu_seqlens_q=cu_seqlens_q, max_query_len=max_query_len, workspace=workspace,
    )  # fmt: skip


def attention_launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Launch | None]:
    """`paged_attention` by the Triton kernels, and its launch, to be repeated on other queries, keys, values and output."""
    batch = (page_table, cu_seqlens_q, seq_lens)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if _fills_the_gpu(q, k_pages, max_query_len, workspace.processors):
        return prefill_launch(q, k_pages, v_pages, *batch, **options)
    return decode_launch(
        q, k_pages, v_pages, page_table, seq_lens, cu_seqlens_q=cu_seqlens_q, max_query_len=max_query_len,
        workspace=workspace, **options,
    )  # fmt: skip


def _remembered(
    work_lists: WorkLists, q: Tensor, k_pages: Tensor, page_table: Tensor, *batch: Tensor | None, **options: Any
) -> Visited | None:
    """`visited_tiles`, made by the first of the layers that are alike."""
    variant: CompiledVariant = options["variant"]
    read = tuple(tensor.data_ptr() for tensor in variant.tensors or ())
    shapes = (q.device, q.dtype, q.shape, k_pages.shape[1:3], page_table.shape[1])
    key = ("visited", variant.identity, read, options["window"], options["softcap"], *shapes)
    if key not in work_lists:
        work_lists[key] = visited_tiles(q, k_pages, page_table, *batch, **options)  # type: ignore[arg-type]
    held: Visited | None = work_lists[key]
    return held


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
    softcap: float | None = None,
    hopper: bool = False,
    batch_invariant: bool = False,
) -> Visited | None:
    """The tiles of keys that `variant.mask_mod` shows, for `paged_attention`; None if it has no mask.

    The Gluon kernel needs them for a window too. They depend on the batch, the variant and the window, not on queries and
    keys: they serve all layers that are alike. Of `q` and `k_pages` only shapes, strides and types are looked at.
    """
    if not q.shape[0]:
        return None
    heads, most_keys = (q.shape[1], k_pages.shape[2]), page_table.shape[1] * k_pages.shape[1]
    options: dict[str, Any] = {"heads": heads, "most_keys": most_keys, "window": window}
    if cu_seqlens_q is not None and (batch_invariant or _fills_the_gpu(q, k_pages, max_query_len, workspace.processors)):
        options["tokens"] = q.shape[0]
        if hopper and _hopper_takes(q, k_pages, variant, window, softcap, True):
            if variant.window_with(window) is None and not variant.hides_tiles:
                return None
            from hf_fastattn.kernels.attention import hopper_prefill

            packed = hopper_prefill.packed_heads(heads[0] // heads[1], variant)
            options |= {"heads": (heads[0], heads[0] // packed), "block_m": hopper_prefill.BLOCK_M}
            return list_tiles(variant, cu_seqlens_q, seq_lens, block_n=hopper_prefill.TILES[q.shape[2]][0], **options)
        if not variant.hides_tiles:
            return None
        tile = tile_of_prefill(q, k_pages, batch_invariant)
        options |= {"block_m": tile.block_m, "block_n": tile.block_n}
        return list_tiles(variant, cu_seqlens_q, seq_lens, **options)
    if not variant.hides_tiles:
        return None
    tile = tile_of_decode(q, k_pages, page_table, max_query_len, workspace.processors, batch_invariant, variant)
    options |= {"max_query_len": max_query_len, "block_n": tile.block_n}
    return list_rows(variant, cu_seqlens_q, seq_lens, **options)


def _hopper_takes(
    q: Tensor, k_pages: Tensor, variant: CompiledVariant, window: int | None, softcap: float | None, listed: bool
) -> bool:
    """Whether the Gluon kernel can take a call, of which what a mask and a window show is `listed` or not."""
    from hf_fastattn.kernels.attention.hopper_prefill import why_not_hopper, why_not_variant

    window = variant.window_with(window)
    hides = window is not None or variant.hides_tiles or not variant.hooks.causal
    return (listed or not hides) and why_not_hopper(q, k_pages, None, softcap) is None and why_not_variant(variant) is None


def _fills_the_gpu(q: Tensor, k_pages: Tensor, max_query_len: int, processors: int) -> bool:
    """Whether there are enough queries for prefill tiles to fill the GPU without a split of the keys."""
    many = max_query_len * (q.shape[1] // k_pages.shape[2]) > MAX_SPLIT_QUERIES
    return many and q.shape[0] * q.shape[1] > processors * MIN_PREFILL_QUERIES
