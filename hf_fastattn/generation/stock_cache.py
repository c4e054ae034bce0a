"""Why a `generate()` call keeps the cache that Transformers gave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import DynamicCache, StaticCache

from hf_fastattn.cache.conversion import why_not_lent
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.pages.model_layout import is_pageable, template_layers
from hf_fastattn.parallel.ranks import is_spread
from hf_fastattn.parallel.understood import why_not_understood
from hf_fastattn.transformers_version import CACHE


def why_stock_cache(supplied: Any, cache: Any, config: Any, generation_config: Any, model_kwargs: dict) -> str | None:
    """Why the call keeps the cache it has: a reason to report, "" for the user's wish, None if pages will do."""
    if isinstance(supplied, PagedCache):
        return ""
    if supplied is not None and (reason := why_not_lent(supplied, config)) is not None:
        return reason
    if supplied is None and (type(cache) is not DynamicCache or getattr(cache, "offloading", False)):
        asked = _asked(generation_config.cache_implementation, generation_config.use_cache)
        if type(cache) is not StaticCache or getattr(cache, "offloading", False):
            return asked
        if generation_config.return_dict_in_generate or generation_config.is_assistant:
            return f"{asked}, and the cache is returned"
    if isinstance(cache, DynamicCache) and not any(map(is_pageable, cache.layers or template_layers(config))):
        return "no layer of the model, as its configuration is now, has keys and values"
    return why_not_prompt(model_kwargs)


def why_no_cache(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Why a call of `generate()` with these arguments keeps nothing, if they say so: then there is nothing to hook into."""
    # The second argument by position, after the prompt.
    config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or model.generation_config
    if CACHE in kwargs or kwargs.get("use_cache", getattr(config, "use_cache", None)) is not False:
        return None
    return _asked(kwargs.get("cache_implementation", getattr(config, "cache_implementation", None)), False)


def _asked(implementation: Any, use_cache: Any) -> str:
    return f"cache_implementation={implementation!r}, use_cache={use_cache}"


def why_not_prompt(model_kwargs: dict) -> str | None:
    """Why no pages will do for a prompt."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask.any(1).all()):
        return "a row of the prompt has no visible token"
    return None


def why_not_here(model: Any) -> str | None:
    """Why no pages will do for a model where its weights are."""
    if model.device.type == "meta":
        return "the weights are offloaded: a device_map with all of them on one device needs no offloading"
    if not is_spread(model):
        return None
    reason = why_not_understood(model)
    ranks = model._fastattn.runtime.ranks
    if reason is None and (ranks is None or ranks.why_not_understood is not None):
        return "tensor parallel: the model was spread, or changed, after patch()"
    return reason
