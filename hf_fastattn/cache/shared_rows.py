"""Caches that begin on pages that others have filled, and one cache made of the rows of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.forward_cache import ForwardCache


def begin_on(cache: ForwardCache, pages: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
    """An empty cache of layers that see all keys holds `tokens[b]` tokens of each row, in these pages.

    Its columns are as many as the longest row has tokens; shorter rows have padding before theirs.
    """
    columns = max(tokens)
    stored = host_masks.after_padding(tokens, columns) if min(tokens) < columns else None
    cache.groups.settle()
    # Until the lengths are noted, the pages are let go of if an exception comes.
    cache.__dict__.update(_loose=True)
    cache.tables[None].hold(pages)
    cache.__dict__.update(lengths=list(tokens), _columns=columns, _stored=stored, _is_frugal=True, _loose=False)


def as_computed_alone(cache: ForwardCache) -> None:
    """A cache that has begun on pages and holds its prompt goes on as one whose prompt was computed whole."""
    cache.__dict__.update(_is_frugal=False)


def gather(cache: ForwardCache, parts: Sequence[tuple[ForwardCache, int]], stored: Tensor) -> None:
    """An empty cache takes the rows of others, which are empty then: row b is row r of a cache, by `parts[b] = (cache, r)`.

    Args:
        parts: each row of each of these caches once.
        stored: `[B, columns]` bool on the host, the columns that hold the rows' tokens.
    """
    cache.groups.settle()
    others = list({id(other): other for other, _ in parts}.values())
    changes: dict[str, Any] = {"lengths": [other.lengths[row] for other, row in parts], "_columns": stored.shape[1]}
    changes["_stored"] = None if host_masks.all_shown(stored) else stored
    for held in (cache, *others):
        # Until the lengths are noted, the pages are let go of if an exception comes.
        held.__dict__.update(_loose=True)
    for window, table in cache.tables.items():
        table.take_rows([(other.tables[window], row) for other, row in parts])
    for other in others:
        other.reset()
    cache.__dict__.update(changes, _loose=False)
