"""Which columns of a padded batch hold tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.transformers_version import CACHE


def visible_columns(mask: Any, cache: PagedCache, rows: int, columns: int) -> Tensor | None:
    """`[B, past + S]` bool on the host: what the mask shows; None if that is all that is stored and every new column.

    Raises:
        ValueError: the mask does not fit, or shows a token that was padding, and so not stored, when it was cached.
    """
    past = cache.get_seq_length()
    if mask is None:
        stored = cache.stored
        if stored is not None and not host_masks.all_shown(stored):
            raise ValueError(
                f"attention_mask is None, but {CACHE} holds padding ({int((~stored).sum())} columns); "
                "pass the mask of all turns, [batch, past + new columns]"
            )
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if mask.shape[0] != rows:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {(rows, past + columns)}: {rows} rows, "
            f"{past} columns in the cache and {columns} new ones"
        )
    if cache.known_mask.knows(mask, rows, past, columns):
        return None
    # Transformers reads the first columns of a longer one, and hides what a shorter one does not reach.
    short = max(past + columns - mask.shape[1], 0)
    told, stored = cache.known_mask.told(mask), cache.stored
    shown = mask[:, : past + columns].to("cpu", torch.bool) if told is None else told[:, : past + columns]
    visible = host_masks.longer(shown, short, False)
    # A batch of other rows than the cache's is refused when its forward begins.
    if stored is not None and len(stored) == rows and host_masks.shows_more(visible[:, :past], stored):
        raise ValueError(
            "attention_mask shows columns that were padding when they were cached, so their keys are not stored; "
            "keep them masked"
        )
    if host_masks.all_shown(visible):
        return None
    return visible
