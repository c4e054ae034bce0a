"""Paged prefill and append: causal attention of ragged rows of new tokens, one program a tile of queries.

The R query heads of a key/value head are packed with the tokens into the rows of a tile (BLOCK_M = tokens * R rows), so
K and V are read once a kv head ("FlashAttention-2", Dao, 2023; packed GQA as in FlashInfer, Ye et al., 2025). Rows of any
lengths share one launch: each program finds its row from `cu_seqlens_q`. Of each row the last queries, which see most keys,
come first. Only tiles on the causal or window edge are masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.attention.configs import Tile, element_bytes, prefill_tile, stages_with
from hf_fastattn.kernels.attention.eight_bit_tiles import attend_tiles
from hf_fastattn.kernels.attention.hooked import hooked_query
from hf_fastattn.kernels.attention.tile import attention_end, empty_state, score_factors, store_output
from hf_fastattn.kernels.attention.visited import Visited, check_visited, prefill_tiles
from hf_fastattn.kernels.launch import arch_of, check_pages, matrix_precision, on_device_of, power_of_2
from hf_fastattn.kernels.relaunch import Launch
from hf_fastattn.kernels.variants.hooks import PLAIN, CompiledVariant


@triton.jit(do_not_specialize=["rows", "window", "stride_table"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, page_table_ptr, cu_seqlens_ptr, seq_lens_ptr,
    rows, window, scale, softcap,
    stride_qt, stride_qh, stride_page, stride_slot, stride_head, stride_table, tensors, visited,
    GROUPS: tl.constexpr, RATIO: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    WHOLE_STAGES: tl.constexpr, LISTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, HOOKS: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M packed queries of one row and kv head; programs past the last tile do nothing.

    `visited` is a `Visited` of LISTS lists a tile of queries, or None; in its tiles that are seen wholly nothing is masked.
    """
    # ---- which row: upto[b] is the number of tiles of queries of rows 0 to b
    row = tl.arange(0, BLOCK_B)
    valid = row < rows
    news = tl.load(cu_seqlens_ptr + row + 1, mask=valid, other=0) - tl.load(cu_seqlens_ptr + row, mask=valid, other=0)
    blocks = tl.where(valid, (news * RATIO + BLOCK_M - 1) // BLOCK_M, 0)  # [BLOCK_B]
    upto = tl.cumsum(blocks, 0)
    block = tl.program_id(0) // GROUPS
    head = tl.program_id(0) % GROUPS
    if block < tl.sum(blocks, 0):
        before = (upto <= block) & valid
        b = tl.sum(before.to(tl.int32), 0)
        first_token = tl.load(cu_seqlens_ptr + b)
        new = tl.load(cu_seqlens_ptr + b + 1) - first_token
        length = tl.load(seq_lens_ptr + b)
        block = (new * RATIO + BLOCK_M - 1) // BLOCK_M - 1 - (block - tl.max(tl.where(before, upto, 0), 0))

        query = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        token = query // RATIO
        ok_m = token < new
        d = tl.arange(0, BLOCK_D)
        off_q = (first_token + token).to(tl.int64) * stride_qt + (head * RATIO + query % RATIO) * stride_qh
        q = tl.load(q_ptr + off_q[:, None] + d[None, :], mask=ok_m[:, None] & (d < D)[None, :], other=0.0)

        h = head * RATIO + query % RATIO
        q_idx = length - new + token
        q = hooked_query(q, h, q_idx, tensors, HOOKS, q_ptr + off_q, ok_m, D, BLOCK_N)

        # ---- which keys: every query of the tile sees [all_from, all_upto), none sees a key outside [none_below, none_from)
        past = length - new
        first_query = past + block * BLOCK_M // RATIO
        last_query = past + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // RATIO, new - 1)
        all_upto = (first_query + 1) // BLOCK_N * BLOCK_N
        none_from = last_query + 1
        if not HOOKS.causal:
            none_from = length
            all_upto = length // BLOCK_N * BLOCK_N
        none_below = 0
        all_from = 0
        if HAS_WINDOW:
            none_below = tl.maximum(first_query - window + 1, 0) // BLOCK_N * BLOCK_N
            all_from = (tl.maximum(last_query - window + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
            all_upto = tl.maximum(all_upto, none_below)
            all_from = tl.minimum(all_from, all_upto)
        lowest = tl.maximum(first_query - window + 1, 0) if HAS_WINDOW else 0

        row_max, row_sum, acc = empty_state(BLOCK_M, BLOCK_D)
        last_key = past + token  # [BLOCK_M]
        table = page_table_ptr + b.to(tl.int64) * stride_table
        head_offset = head * stride_head
        edge_from = all_upto
        listed = None
        if visited is not None:
            # Entries of the lists of this tile of queries: tiles seen wholly at their beginning, others at their end.
            counts_ptr, tiles_ptr, columns = visited
            item = tl.program_id(0) // GROUPS * LISTS + (head if LISTS > 1 else 0)
            listed = tiles_ptr + item.to(tl.int64) * columns
            all_from = 0
            all_upto = tl.load(counts_ptr + item * 2)
            edge_from = columns - tl.load(counts_ptr + item * 2 + 1)
            none_from = columns
        elif HAS_WINDOW:
            row_max, row_sum, acc = attend_tiles(
                q, row_max, row_sum, acc, none_below, all_from, k_ptr, v_ptr, table, head_offset, last_key, lowest, length,
                window, scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
                D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HOOKS,
            )  # fmt: skip
        row_max, row_sum, acc = attend_tiles(
            q, row_max, row_sum, acc, all_from, all_upto, k_ptr, v_ptr, table, head_offset, last_key, lowest, length,
            window, scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
            D, BLOCK_D, PAGE, BLOCK_N, WHOLE_STAGES, False, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HOOKS, listed,
            visited is None,
        )  # fmt: skip
        row_max, row_sum, acc = attend_tiles(
            q, row_max, row_sum, acc, edge_from, none_from, k_ptr, v_ptr, table, head_offset, last_key, lowest, length,
            window, scale, softcap, stride_page, stride_slot, b, head, h, q_idx, tensors,
            D, BLOCK_D, PAGE, BLOCK_N, STAGES, True, HAS_WINDOW, HAS_SOFTCAP, PRECISION, HOOKS, listed,
        )  # fmt: skip
        out, lse = attention_end(row_max, row_sum, acc, h, q_idx, tensors, HOOKS)
        out_row = (first_token + token).to(tl.int64) * (GROUPS * RATIO) + head * RATIO + query % RATIO
        store_output(out_ptr, lse_ptr, out_row, ok_m, out, lse, D)


def tile_of_prefill(q: Tensor, k_pages: Tensor, batch_invariant: bool) -> Tile:
    """The tile that a launch takes for these shapes."""
    queries = None if batch_invariant else q.shape[0] * (q.shape[1] // k_pages.shape[2])
    return prefill_tile(arch_of(q.device), element_bytes(q, k_pages), power_of_2(q.shape[2]), queries)


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    batch_invariant: bool = False,
    variant: CompiledVariant = PLAIN,
    visited: Visited | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed rows of new tokens over paged keys and values.

    Args:
        q: `[T, H, D]` queries after RoPE, row after row as `cu_seqlens_q` says.
        k_pages: `[N, P, G, D]` pages of keys, any strides but 1 in the last dimension; `v_pages` with the same.
        page_table: `[B, columns]` int32; columns that no query of the row sees are not read.
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin; rows may be empty.
        seq_lens: `[B]` int32, keys of each row after the append.
        scale: factor on the scores.
        window: keys a query sees, itself included; all by default.
        softcap: scores become `softcap * tanh(score / softcap)`.
        batch_invariant: a row's output and LSE are bitwise the same whatever the other rows and the places of the pages.
        variant: what attention does besides.
        visited: the tiles that its mask shows; see `paged.visited_tiles`. Without it all are visited.

    Returns:
        Output `[T, H, D]` in q's dtype and LSE `[T, H]` fp32, natural logarithm.

    Raises:
        ValueError: shapes, dtypes or strides do not fit each other or the kernel.
    """
    out, lse, _ = prefill_launch(
        q, k_pages, v_pages, page_table, cu_seqlens_q, seq_lens, scale=scale, window=window, softcap=softcap,
        batch_invariant=batch_invariant, variant=variant, visited=visited,
    )  # fmt: skip
    return out, lse


def prefill_launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    batch_invariant: bool = False,
    variant: CompiledVariant = PLAIN,
    visited: Visited | None = None,
) -> tuple[Tensor, Tensor, Launch | None]:
    """`paged_prefill`, and the launch, to be repeated on other queries, keys, values and output; None without tokens."""
    check_pages(q, k_pages, v_pages)
    tokens, heads, dim = q.shape
    rows, page, groups = seq_lens.shape[0], k_pages.shape[1], k_pages.shape[2]
    if page_table.shape[0] != rows or cu_seqlens_q.shape[0] != rows + 1:
        raise ValueError(
            f"page_table has {page_table.shape[0]} rows, cu_seqlens_q {cu_seqlens_q.shape[0]} entries and seq_lens {rows}; "
            "they must be [B, columns], [B + 1] and [B]"
        )
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    if not tokens:
        return out, lse, None
    ratio, block_d = heads // groups, power_of_2(dim)
    tile = tile_of_prefill(q, k_pages, batch_invariant)
    tiles = prefill_tiles(tokens * ratio, rows, tile.block_m)
    if visited is not None:
        check_visited(visited, tiles, tile.block_m, tile.block_n)
    factor, cap = score_factors(scale, softcap, variant.hooks)
    window = variant.window_with(window)
    launch = Launch(
        prefill_kernel, (tiles * groups,),
        (
            q, k_pages, v_pages, out, lse, page_table, cu_seqlens_q, seq_lens,
            rows, window or 0, factor, cap,
            q.stride(0), q.stride(1), k_pages.stride(0), k_pages.stride(1), k_pages.stride(2), page_table.stride(0),
            variant.tensors, None if visited is None else visited.for_kernel(),
        ),
        dict(
            GROUPS=groups, RATIO=ratio, D=dim, BLOCK_D=block_d, PAGE=page,
            BLOCK_B=max(power_of_2(rows), 16), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            STAGES=stages_with(variant, tile.stages, tile.block_m, tile.block_n),
            WHOLE_STAGES=stages_with(variant, tile.stages, tile.block_m, tile.block_n, masked=visited is None),
            LISTS=1 if visited is None else visited.counts.shape[1],
            HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None,
            PRECISION=matrix_precision(q.dtype, tile.block_m), HOOKS=variant.hooks_for(q.dtype), num_warps=tile.warps,
        ),
    )  # fmt: skip
    with on_device_of(q):
        launch.first()
    return out, lse, launch
