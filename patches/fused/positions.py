"""What layers take of the positions of a forward's tokens: the tables of RoPE, made once for all of them.

The model's rotary embedding is called, but for steps where it is of a form that one launch computes, with the signed table
that our attention reads: ten small launches, each of which waits for the one ahead, are a thirtieth of a small model's step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.placement import place_of
from hf_fastattn.kernels.launch import DTYPES
from hf_fastattn.patches.modules.module_state import ModuleState
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import is_plain_tensor


def attention_positions(
    decoder: Any, cache: PagedCache, states: Tensor, position_ids: Tensor, place: torch.device, ours: bool
) -> dict[str, Any]:
    """Keywords of attention modules.

    Args:
        decoder: patched.
        cache: with a paged batch under way, which is left what our attention reads.
        states: `[B, S, hidden]`, what layers are given.
        position_ids: `[1 or B, S]`, or with axes in front.
        place: where the layers compute.
        ours: launches may be of our kernels.
    """
    state: ModuleState = vars(decoder)[STATE]
    if state.runtime.variants.all_inside:
        # Nobody reads them.
        unread = states.new_empty(1, states.shape[1], 2)
        return {"position_embeddings": (unread, unread), "position_ids": position_ids}
    rotated = _on_three_axes(position_ids) if state.family.axes else position_ids
    tables = _at_once(decoder.rotary_emb, cache, states, rotated, place) if ours else None
    if tables is None:
        tables = state.runtime.rotary_copies.tables(decoder.rotary_emb, states, rotated, place)
    return {"position_embeddings": tables, "position_ids": position_ids}


def _at_once(
    rotary: Any, cache: PagedCache, states: Tensor, position_ids: Tensor, place: torch.device
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """cos and sin of the tokens of a step by a launch of ours; None where the rotary embedding has to be called."""
    batch = cache.paged_batch
    if batch is None or not batch.is_decode or cache.padding is not None or place_of(rotary, place) != place:
        return None
    if batch.options.batch_invariant:
        # A token's tables are the same to the bit in prompts.
        return None
    if position_ids.shape != states.shape[:-1] or position_ids.numel() != batch.tokens or states.dtype not in DTYPES:
        return None
    # A user's may be fractions, or lie elsewhere.
    if not is_plain_tensor(position_ids, states.device, (torch.int64, torch.int32)):
        return None
    # Not before: it imports Triton.
    from hf_fastattn.kernels.attention.rope_tables import rope_tables
    from hf_fastattn.patches.attention.rotary_forms import frequencies_of

    held = frequencies_of(rotary, states.device)
    if held is None:
        return None
    cos, sin, signed = rope_tables(held.inv_freq, position_ids, held.factor, states.dtype)
    batch.hold_rope(cos, sin, signed)
    return cos, sin


def _on_three_axes(position_ids: Tensor) -> Tensor:
    """Those that RoPE takes, `[3, B, S]`."""
    axes = position_ids if position_ids.ndim == 3 else position_ids[None]
    return axes[1:] if len(axes) == 4 else axes.expand(3, -1, -1)
