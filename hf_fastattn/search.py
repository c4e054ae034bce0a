"""`fork`, `truncate`, `append`: what a search over texts does with a cache whose rows share pages.

A tree of texts costs what its nodes cost: rows of a fork share all pages with those that they come from, and copy a page at
most when they go on. `generate()` takes a forked cache as `past_key_values` (`cache` from Transformers 5.24 on).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.transformers_version import CACHE


def fork(cache: PagedCache, indices: Sequence[int] | Tensor) -> PagedCache:
    """A new cache whose row b is what row `indices[b]` of `cache` is now; `cache` stays as it is.

    Args:
        indices: numbers of rows, as often as wanted, in any order.

    Raises:
        TypeError: `cache` is no `PagedCache`.
        ValueError: there is no such row.
    """
    _check(cache)
    rows = [int(row) for row in indices]
    if not rows or not all(0 <= row < cache.batch_size for row in rows):
        raise ValueError(f"indices={rows} must be numbers of the cache's {max(cache.batch_size, 0)} rows, at least one")
    other = copy.deepcopy(cache)
    other.select_rows(rows)
    return other


def truncate(cache: PagedCache, length: int) -> PagedCache:
    """Keep the first `length` columns of every row, padding included; returns the same cache.

    Raises:
        TypeError: `cache` is no `PagedCache`.
        ValueError: the cache has fewer columns.
        RuntimeError: the columns to keep were released behind a sliding window.
    """
    _check(cache)
    if not 0 <= length <= cache.get_seq_length():
        raise ValueError(f"length={length} must lie between 0 and the cache's {cache.get_seq_length()} columns")
    if length == 0:
        cache.reset()
    else:
        cache.crop(length - cache.get_seq_length())
    return cache


def append(
    model: Any, cache: PagedCache, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 1
) -> Tensor:
    """Compute the next tokens of every row of a cache, without gradients.

    Args:
        model: patched; also one that is not works, without sharing.
        cache: of as many rows as `input_ids`, or empty.
        input_ids: `[B, n]` tokens.
        attention_mask: `[B, n]`, 0 for padding on the left; ones by default.
        logits_to_keep: of how many last columns logits are returned; 0 for all.

    Returns:
        `[B, columns, V]` logits.

    Raises:
        TypeError: `cache` is no `PagedCache`.
        ValueError: there are other rows in the cache than in `input_ids`.
    """
    _check(cache)
    if cache.batch_size not in (-1, len(input_ids)):
        raise ValueError(f"input_ids has {len(input_ids)} rows and the cache {cache.batch_size}; fork() the cache first")
    new = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
    past = cache.stored
    known = new.new_ones(len(new), cache.get_seq_length()) if past is None else past.to(new)
    mask = torch.cat((known, new), 1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, known.shape[1] :]
    arguments = {"attention_mask": mask, "position_ids": positions, CACHE: cache, "use_cache": True}
    with torch.no_grad():
        logits: Tensor = model(input_ids=input_ids, logits_to_keep=logits_to_keep, **arguments).logits
    return logits


def _check(cache: Any) -> None:
    if not isinstance(cache, PagedCache):
        raise TypeError(f"cache is a {type(cache).__name__}; make one with hf_fastattn.PagedCache(model.config)")
