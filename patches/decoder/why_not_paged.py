"""Why a forward has to run the original attention, and not pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache import host_masks
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.unchanged import why_not_ours
from hf_fastattn.runtime import Runtime

HIDES_CACHED = "the mask hides tokens that are cached"
GRADIENTS = "gradients are needed"
NO_TOKEN = "no row has a new token"
# Dropout that is applied by functions instead of modules, by its name in the configuration.
DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


def why_not_paged(decoder: Any, mask: Any, cache: PagedCache, visible: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why this forward has to run the original attention; None if pages will do."""
    config = decoder.config
    runtime: Runtime = vars(decoder)[STATE].runtime
    call = runtime.current
    first = call is None or not cache.get_seq_length()
    if first:
        runtime.variants.refresh()
    if first or (call is not None and call.users_code):
        changed = why_not_ours(decoder)
        if changed is not None:
            return changed
    if call is not None and call.why_dense is not None:
        return call.why_dense
    if cache.dense is not None:
        return "the cache holds dense layers"
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        return GRADIENTS
    if torch.is_grad_enabled() and runtime.variants.needs_gradients:
        return GRADIENTS
    if decoder.training:
        for name in DROPOUTS:
            if getattr(config, name, 0.0):
                return f"{name.replace('_', ' ')} is active"
    if kwargs.get("output_attentions", config.output_attentions):
        return "attention weights are asked for"
    if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        return "router logits, padding's too, are asked for"
    if kwargs.get("is_causal", True) is False:
        return "is_causal=False"
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return "a custom attention mask is given"
    if visible is None:
        return None
    past = cache.get_seq_length()
    before, stored = visible[:, :past], cache.stored
    if not (host_masks.all_shown(before) if stored is None else host_masks.equal(before, stored)):
        return HIDES_CACHED
    return _why_not_mask(visible, past, cache, 0 if call is None else call.logits_read)


def _why_not_mask(visible: Tensor, past: int, cache: PagedCache, logits_read: int) -> str | None:
    """Why what the mask `visible [B, past + S]` hides cannot be left out.

    Args:
        logits_read: the logits of so many last columns are read, whether they hold tokens or not: by `generate()`.
    """
    # By numpy, which takes the host a fraction of the time for as few elements.
    shown = visible.numpy()
    if not shown[:, past:].any():
        return NO_TOKEN
    if any(window is not None for window in cache.tables):
        hidden = (shown.cumsum(1) > 0) & ~shown
        if (hidden[:, :-1] & shown[:, 1:]).any():
            return "the mask has holes, and a sliding window counts them"
    # A row that has no token yet is read in a later chunk of its prompt.
    read = shown[shown.any(1), past:][:, -logits_read:] if logits_read else shown[:, :0]
    return None if read.all() else "the mask hides a column whose logits are read"


def why_not_tokens(arguments: dict[str, Any], columns: int) -> str | None:
    """Why tokens and positions are none that can be packed."""
    positions = arguments["position_ids"]
    if positions is not None and positions.shape[-1] != columns:
        return f"{positions.shape[-1]} positions for {columns} columns"
    return None if columns else NO_TOKEN
