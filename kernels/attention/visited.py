"""The tiles of keys that a variant's mask shows, as lists on the device: whole tiles of hidden keys are not visited.

A mask is any function, so it is evaluated for all pairs of a query and a key, once for all layers of a forward. In decode
only the new queries are evaluated. All sizes depend on the shapes of the batch alone, so that a captured graph follows
lengths that changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_fastattn.kernels.launch import on_device_of, power_of_2
from hf_fastattn.kernels.rehearsal import prepared
from hf_fastattn.kernels.variants.hooks import CompiledVariant

# Pairs of queries and keys that a program evaluates at a time, and most queries and keys of them: what a mask looks up for a
# query serves the keys of a thread, of which there are four.
PAIRS, MOST_QUERIES, MOST_KEYS = 8192, 16, 4096
# Added to the number of a tile: of it the mask hides nothing that causality and the window show.
MASK_HIDES_NOTHING = tl.constexpr(1 << 30)


class Visited(NamedTuple):
    """Which tiles of `block_n` keys the queries of a batch see; made by `list_rows` and `list_tiles`.

    Attributes:
        counts: `[items, lists, 2]` int32: tiles that all queries of the item see wholly, and those that one sees in part.
        tiles: `[items, lists, columns]` int32, numbers of tiles: those seen wholly from the front on, those seen in part
            before the end; with MASK_HIDES_NOTHING added where that is so. An item is a tile of
            `block_m` packed queries of one row, numbered as by `prefill.py`; or, if `block_m` is 0, a row of the batch, and
            all its tiles count as seen in part. There is a list a key/value head, or one for all.
        block_m: packed queries of an item, or 0.
        block_n: keys of a tile.
    """

    counts: Tensor
    tiles: Tensor
    block_m: int
    block_n: int

    def for_kernel(self) -> tuple[Tensor, Tensor, int]:
        """As kernels take it."""
        return self.counts, self.tiles, self.tiles.shape[2]


@triton.jit
def number_of(entry):
    """The number of the tile of a list's entry."""
    return entry & (MASK_HIDES_NOTHING - 1)


@triton.jit
def find_tile(cu_seqlens_ptr, block, rows, RATIO: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row, first token, new tokens and block of the row, of a tile of BLOCK_M packed queries; the row is -1 past the last.

    Of each row the last queries come first.
    """
    row = tl.arange(0, BLOCK_B)
    valid = row < rows
    news = tl.load(cu_seqlens_ptr + row + 1, mask=valid, other=0) - tl.load(cu_seqlens_ptr + row, mask=valid, other=0)
    blocks = tl.where(valid, (news * RATIO + BLOCK_M - 1) // BLOCK_M, 0)  # [BLOCK_B]
    upto = tl.cumsum(blocks, 0)
    before = (upto <= block) & valid
    b = tl.sum(before.to(tl.int32), 0)
    inside = block < tl.sum(blocks, 0)
    new = tl.sum(tl.where(row == b, news, 0), 0)
    block = (new * RATIO + BLOCK_M - 1) // BLOCK_M - 1 - (block - tl.max(tl.where(before, upto, 0), 0))
    return tl.where(inside, b, -1), new, block


@triton.jit(do_not_specialize=["rows", "window", "columns"])
def visited_kernel(
    counts_ptr, tiles_ptr, cu_seqlens_ptr, seq_lens_ptr, rows, window, columns, tensors,
    LISTS: tl.constexpr, RATIO: tl.constexpr, BY_HEAD: tl.constexpr, BY_ROW: tl.constexpr, BLOCK_B: tl.constexpr,
    TILE: tl.constexpr, QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HOOKS: tl.constexpr,
):  # fmt: skip
    """The lists of one item and key/value head: all queries of a row (BY_ROW), or a tile of TILE packed queries.

    QUERIES queries and TILES tiles of BLOCK_N keys are evaluated at a time.
    """
    item = tl.program_id(0) // LISTS
    head = tl.program_id(0) % LISTS
    if BY_ROW:
        b = item
        new = 1
        if cu_seqlens_ptr is not None:
            new = tl.load(cu_seqlens_ptr + b + 1) - tl.load(cu_seqlens_ptr + b)
        first = 0
        past = new - 1
    else:
        b, new, block = find_tile(cu_seqlens_ptr, item, rows, RATIO, BLOCK_B, TILE)
        first = block * TILE // RATIO
        past = tl.minimum((block * TILE + TILE - 1) // RATIO, new - 1)
    if b >= 0:
        # Tokens `first` to `past` of the row, each with the R heads of the key/value head if the mask reads the head.
        length = tl.load(seq_lens_ptr + b)
        packed = 1
        if BY_HEAD:
            packed = RATIO
        first_q = length - new + first
        past_q = length - new + past
        lowest = 0
        if HAS_WINDOW:
            lowest = tl.maximum(first_q - window + 1, 0)
        end = length
        if HOOKS.causal:
            end = tl.minimum(past_q + 1, length)
        list_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * columns
        n = tl.arange(0, TILES * BLOCK_N)
        t = tl.arange(0, TILES)
        whole = 0
        partly = 0
        for tile in range(lowest // BLOCK_N, tl.cdiv(end, BLOCK_N), TILES):
            key_n = tile * BLOCK_N + n
            # How many queries see each key, and how many would without the mask.
            seen_n = tl.zeros([TILES * BLOCK_N], tl.int32)
            for query in range(first * packed, (past + 1) * packed, QUERIES):
                m = query + tl.arange(0, QUERIES)
                token = m // packed
                h = tl.zeros_like(m)
                if BY_HEAD:
                    h = head * RATIO + m % RATIO
                q_idx = length - new + token
                last = tl.zeros_like(m) + length - 1
                if HOOKS.causal:
                    last = tl.minimum(q_idx, last)
                last = tl.where(token <= past, last, -1)
                seen = key_n[None, :] <= last[:, None]
                if HAS_WINDOW:
                    seen = seen & (key_n[None, :] > q_idx[:, None] - window)
                if HOOKS.mask_mod is not None:
                    seen = seen & HOOKS.mask_mod(b, h[:, None], q_idx[:, None], key_n[None, :], tensors)
                seen_n += tl.sum(seen.to(tl.int32), 0)
            first_n = tl.zeros_like(n) + first_q
            if HOOKS.causal:
                first_n = tl.maximum(first_n, key_n)
            past_n = tl.zeros_like(n) + past_q
            if HAS_WINDOW:
                past_n = tl.minimum(past_n, key_n + window - 1)
            most_n = tl.where(key_n < length, tl.maximum(past_n - first_n + 1, 0), 0) * packed
            seen_t = tl.sum(tl.reshape(seen_n, (TILES, BLOCK_N)), 1)
            most_t = tl.sum(tl.reshape(most_n, (TILES, BLOCK_N)), 1)
            some_t = (seen_t > 0).to(tl.int32)
            all_t = (seen_t == (past - first + 1) * packed * BLOCK_N).to(tl.int32)
            if BY_ROW:
                all_t = tl.zeros_like(all_t)
            part_t = some_t - all_t
            number = tile + t + tl.where(seen_t == most_t, MASK_HIDES_NOTHING, 0)
            tl.store(list_ptr + whole + tl.cumsum(all_t, 0) - 1, number, mask=all_t != 0)
            tl.store(list_ptr + columns - partly - tl.cumsum(part_t, 0), number, mask=part_t != 0)
            whole += tl.sum(all_t, 0)
            partly += tl.sum(part_t, 0)
        tl.store(counts_ptr + tl.program_id(0) * 2, whole)
        tl.store(counts_ptr + tl.program_id(0) * 2 + 1, partly)


def list_rows(
    variant: CompiledVariant,
    cu_seqlens_q: Tensor | None,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    heads: tuple[int, int],
    most_keys: int,
    block_n: int,
    window: int | None = None,
) -> Visited:
    """The tiles that some new query of a row sees, for `decode.py`.

    Args:
        cu_seqlens_q: `[B + 1]` int32, where each row's queries begin; None if every row has one.
        seq_lens: `[B]` int32, keys of each row after the append.
        max_query_len: the most new tokens of a row, known on the host.
        heads: query heads and key/value heads.
        most_keys: keys that a row can have, as the page table is wide.
        block_n: keys of a tile.
        window: keys a query sees, itself included; all by default.
    """
    items = seq_lens.shape[0]
    return _listed(variant, cu_seqlens_q, seq_lens, items, max_query_len, heads, most_keys, 0, block_n, window)


def list_tiles(
    variant: CompiledVariant,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    tokens: int,
    heads: tuple[int, int],
    most_keys: int,
    block_m: int,
    block_n: int,
    window: int | None = None,
) -> Visited:
    """The tiles that each tile of packed queries sees, for `prefill.py`.

    Args:
        tokens: new tokens of all rows (T).
        block_m: packed queries of a tile.
    """
    ratio = heads[0] // heads[1]
    items = prefill_tiles(tokens * ratio, seq_lens.shape[0], block_m)
    most = block_m // ratio if block_m % ratio == 0 else block_m // ratio + 2
    return _listed(variant, cu_seqlens_q, seq_lens, items, most, heads, most_keys, block_m, block_n, window)


def prefill_tiles(queries: int, rows: int, block_m: int) -> int:
    """An upper bound that needs no lengths: no row has more than one tile that is not full."""
    return min(triton.cdiv(queries, block_m) + rows - 1, queries)


def check_visited(visited: Visited, items: int, block_m: int, block_n: int) -> None:
    """
    Raises:
        ValueError: it is not of this batch.
    """
    found = (visited.counts.shape[0], visited.block_m, visited.block_n)
    if found != (items, block_m, block_n):
        raise ValueError(
            f"visited is of (items, block_m, block_n)={found}, but this launch takes {(items, block_m, block_n)}; make it "
            "with paged.visited_tiles for the same arguments"
        )


def _listed(
    variant: CompiledVariant, cu_seqlens_q: Tensor | None, seq_lens: Tensor, items: int, most_tokens: int,
    heads: tuple[int, int], most_keys: int, block_m: int, block_n: int, window: int | None,
) -> Visited:  # fmt: skip
    ratio, by_head, device = heads[0] // heads[1], variant.mask_by_head, seq_lens.device
    lists, columns, window = heads[1] if by_head else 1, triton.cdiv(most_keys, block_n), variant.window_with(window)
    counts = torch.empty(items, lists, 2, dtype=torch.int32, device=device)
    tiles = torch.empty(items, lists, columns, dtype=torch.int32, device=device)
    queries = min(power_of_2(most_tokens * (ratio if by_head else 1)), MOST_QUERIES)
    at_once = min(max(min(PAIRS // queries, MOST_KEYS) // block_n, 1), power_of_2(columns))
    with on_device_of(seq_lens):
        prepared(visited_kernel)[(items * lists,)](
            counts, tiles, cu_seqlens_q, seq_lens, seq_lens.shape[0], window or 0, columns, variant.tensors,
            LISTS=lists, RATIO=ratio, BY_HEAD=by_head, BY_ROW=block_m == 0, BLOCK_B=max(power_of_2(seq_lens.shape[0]), 16),
            TILE=block_m, QUERIES=queries, BLOCK_N=block_n, TILES=at_once,
            HAS_WINDOW=window is not None, HOOKS=variant.hooks,
            num_warps=4,
        )  # fmt: skip
    return Visited(counts, tiles, block_m, block_n)
