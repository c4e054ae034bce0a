"""Drafts (assisted decoding, prompt lookup) for models with linear attention, which Transformers refuses for any of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.cache.paged_layer import PagedLayer
from hf_fastattn.patches.fused.forward import why_not_walked


class Stateful:
    """`_is_stateful` of a patched model's class: False in its calls, of which `check_drafts` is asked; else as in stock."""

    def __get__(self, model: Any, kind: Any = None) -> bool:
        stateful = bool((type(model) if kind is None else kind)._fastattn_base._is_stateful)
        return stateful and (model is None or model._fastattn.runtime.current is None)


def check_drafts(model: Any, mode: Any, generation_config: Any, cache: Any) -> None:
    """Raise Transformers' own error where drafts would leave behind states that know of tokens that were not accepted.

    Forwards over pages keep the states before the last tokens; those in which layers are called do not.
    """
    if mode is not GenerationMode.ASSISTED_GENERATION or not type(model)._is_stateful:
        return
    given = {"input_ids": torch.empty(0, dtype=torch.int64, device=model.device), "use_cache": True}
    called = generation_config.output_hidden_states or generation_config.output_attentions
    called = called or why_not_walked(model._fastattn.decoder(model), given) is not None
    called = called or not isinstance(cache, PagedCache) or not _drafts_have_pages(cache, generation_config)
    # Of a filled cache Transformers forgets what it holds, and gives it the whole prompt again.
    if called or cache.get_seq_length():
        raise ValueError(f"assisted generation is not supported with stateful models, such as {type(model).__name__}")


def _drafts_have_pages(cache: PagedCache, generation_config: Any) -> bool:
    """Whether there is a layer with keys and values among those that draft, if the model's first layers do."""
    first = generation_config.assistant_early_exit
    return first is None or any(isinstance(layer, PagedLayer) for layer in cache.layers[:first])
