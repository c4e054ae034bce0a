"""Tokens that a mask hides although the cache holds them: rows of a chat that ended early, and went on being padded.

They are taken out of the pages, so that what follows reads pages as before, and kept aside for a mask that shows them again.
Pages before a row's first hidden token stay where they are, shared or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.cache.dense_cache import DenseCache
from hf_fastattn.cache.hidden_columns import Hidden
from hf_fastattn.cache.known_mask import KnownMask
from hf_fastattn.kernels.page_formats import is_eight_bits, move_tokens
from hf_fastattn.pages.page_table import PageTable


def can_hide(cache: DenseCache, rows: int) -> bool:
    """Whether tokens can be taken out for a batch of so many rows, which may not be the cache's.

    A window would count them, drafts are taken back column by column, and rows that forget tokens may have none to keep.
    """
    keeps_all = cache.dense is None and cache.stream is None and not cache.record_past
    return keeps_all and rows == cache.batch_size and set(cache.tables) == {None}


def hide_tokens(cache: DenseCache, visible: Tensor) -> None:
    """Store only the tokens that `visible` shows.

    Args:
        visible: `[B, columns]` bool on the host.

    Raises:
        CacheFullError: the pages that are rewritten do not fit into the memory limit; the cache is as before.
    """
    stored = cache.stored
    stored = torch.ones_like(visible) if stored is None else stored
    keep = visible & stored
    starts, sources, counts = _tails(cache, stored, keep)
    aside = _kept_aside(cache, stored & ~keep)
    table, size = cache.tables[None], cache.groups.page_size
    group = cache.groups.group(None)
    rewritten = PageTable(group.pool, size)
    cache.groups.settle()
    # If an exception comes before the tables are exchanged, owners are recounted without the new table.
    group.pool.unsettled = True
    table.fork_into(rewritten, starts)
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    rewritten.reserve(starts, lengths, cache.ahead_of(visible.shape[1]), cache.counters, group.copy_pages)
    targets = _slots(rewritten.rows, starts, lengths, size)
    for layer in cache.paged_layers:
        held = group.storage.pages(layer.index)
        if held is not None:
            _move(group.storage.layer(layer.index, held[0], group.pool.capacity), sources, targets)
    changes = {"lengths": lengths, "_stored": keep, "hidden": aside, "known_mask": KnownMask()}
    cache.exchange_tables({None: rewritten}, changes)


def show_again(cache: DenseCache, mask: Tensor | None) -> None:
    """Put tokens that were kept aside back, for pages to be made anew, if `mask [B, columns]` shows one of them."""
    aside = next(iter(cache.hidden.values()), None)
    if aside is None or cache.dense is not None or cache.lent is not None:
        return
    if mask is not None:
        shown = mask[:, : aside.where.shape[1]].to("cpu", torch.bool)
        if not bool((shown & aside.where[:, : shown.shape[1]]).any()):
            return
    assert cache.stored is not None
    known = cache.stored.clone()
    known[:, : aside.where.shape[1]] |= aside.where
    cache.hold_dense()
    cache.__dict__.update(_known_stored=known, hidden={})


def _tails(cache: DenseCache, stored: Tensor, keep: Tensor) -> tuple[list[int], Tensor, list[int]]:
    """Of each row where its first page with a hidden token begins; slots and number of the tokens kept from there."""
    size, rows = cache.groups.page_size, cache.tables[None].rows
    starts, sources, counts = [], [], []
    for row, pages in enumerate(rows):
        kept = keep[row][stored[row]]
        gone = (~kept).nonzero()
        start = int(gone[0]) // size * size if len(gone) else len(kept)
        tokens = start + kept[start:].nonzero().flatten()
        held = torch.tensor(pages, dtype=torch.int64, device="cpu")
        starts.append(start)
        counts.append(len(tokens))
        sources.append(held[tokens // size] * size + tokens % size)
    return starts, torch.cat(sources), counts


def _slots(rows: list[list[int]], firsts: list[int], lasts: list[int], size: int) -> Tensor:
    parts = []
    for pages, first, last in zip(rows, firsts, lasts, strict=True):
        tokens = torch.arange(first, last, device="cpu")
        parts.append(torch.tensor(pages, dtype=torch.int64, device="cpu")[tokens // size] * size + tokens % size)
    return torch.cat(parts)


def _move(pair: tuple[Tensor, Tensor], sources: Tensor, targets: Tensor) -> None:
    with torch.no_grad():
        if is_eight_bits(pair[0]):
            move_tokens(*pair, sources.to(pair[0].device), targets.to(pair[0].device))
            return
        for pages in pair:
            tokens = pages.flatten(0, 1)
            tokens.index_copy_(0, targets.to(pages.device), tokens.index_select(0, sources.to(pages.device)))


def _kept_aside(cache: DenseCache, gone: Tensor) -> dict[int, Hidden]:
    """The keys and values of the columns `gone [B, columns]`, and of those that were kept aside before."""
    before = next(iter(cache.hidden.values()), None)
    where = gone.clone()
    if before is not None:
        where[:, : before.where.shape[1]] |= before.where
    columns = where.any(0).nonzero()
    first, last = int(columns[0]), int(columns[-1]) + 1
    aside = {}
    for layer in cache.paged_layers:
        if cache.groups.group(None).storage.pages(layer.index) is not None:
            keys, values = cache.read_columns(layer, first, last, cache.stored)
            if layer.index in cache.hidden:
                cache.hidden[layer.index].put_back(first, keys, values)
            aside[layer.index] = Hidden.of(where[:, :last], first, keys, values)
    return aside
