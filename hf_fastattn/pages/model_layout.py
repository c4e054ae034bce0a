"""What a model's configuration says of its cache: layers, windows, key heads; and which layers pages can hold."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from hf_fastattn.autocast import forward_dtype


def layer_window(layer: Any) -> int | None:
    """The window of a Transformers cache layer; None if it sees all keys.

    Raises:
        ValueError: the layer is of a kind that pages cannot hold.
    """
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    if type(layer) is DynamicLayer:
        return None
    raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be paged")


def is_pageable(layer: Any) -> bool:
    """Whether the layer is an ordinary attention layer, full or with a sliding window."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def is_recurrent(layer: Any) -> bool:
    """Whether the layer keeps the state of a linear attention and nothing else."""
    return type(layer) is LinearAttentionLayer


def template_layers(config: Any) -> list[Any]:
    """The layers Transformers would give a dynamic cache of this model, as templates for ours."""
    template: Cache = DynamicCache(config=config.get_text_config(decoder=True))
    return template.layers


def key_shape(config: Any) -> tuple[int, int]:
    """Key heads and head dim of a model's attention layers."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def keys_dtype(model: Any) -> torch.dtype:
    """The dtype of the keys that the model writes now."""
    return forward_dtype(model) or model.dtype


def cache_layout(config: Any, templates: list[Any] | None = None) -> tuple[Any, ...]:
    """Key heads, head dim and the layers' windows: models that differ here cannot use each other's cache.

    Args:
        templates: `template_layers(config)`, if they are known.
    """
    layers = template_layers(config) if templates is None else templates
    return *key_shape(config), *(layer_window(layer) if is_pageable(layer) else type(layer) for layer in layers)
