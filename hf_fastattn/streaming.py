"""What generation without end (`FastAttnConfig.streaming`) works with, and what it refuses by name."""

from __future__ import annotations

from typing import Any

from hf_fastattn.config import FastAttnConfig
from hf_fastattn.kernels.variants.variant import Variant
from hf_fastattn.pages.model_layout import is_pageable, layer_window, template_layers
from hf_fastattn.parallel.gathered_weights import why_counted
from hf_fastattn.parallel.ranks import is_spread
from hf_fastattn.patches.family import Family


def streaming_variant(given: Any) -> Variant:
    """The variant that streaming is made of: keys rotated in the kernels, to their places in the cache.

    Raises:
        ValueError: another one is given.
    """
    if given is not None:
        raise ValueError(
            "streaming and variant=: functions of a variant get positions in the row, which streaming does not keep; use one"
        )
    return Variant(rope="inside")


def check_streaming(model: Any, family: Family, config: FastAttnConfig) -> None:
    """Raise a `ValueError` that says why a model cannot stream, if it cannot."""
    assert config.streaming is not None
    reason = _why_not(model, family, config)
    if reason is not None:
        raise ValueError(f"{config.streaming} does not work here: {reason}")


def _why_not(model: Any, family: Family, config: FastAttnConfig) -> str | None:
    assert config.streaming is not None
    layers = template_layers(model.config)
    if not all(map(is_pageable, layers)):
        return f"a {family.model_type} model has layers of linear attention, whose states keep no single tokens"
    windows = sorted({window for layer in layers if (window := layer_window(layer)) is not None})
    if windows:
        return f"layers have windows of their own ({windows}), so that they need no streaming to stay small"
    if family.query_scale is not None:
        return f"a {family.model_type} model scales queries by their position in the row"
    if is_spread(model):
        return "the model is spread over several processes"
    counted = why_counted(model)
    if counted is not None:
        return counted
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    capacity = config.streaming.layout(config.page_size).capacity
    if most is not None and capacity > most:
        return f"in pages of {config.page_size} a row keeps {capacity} tokens, but the model knows {most} positions"
    return None


def why_not_call(asked: str) -> str | None:
    """Why a call of `generate()` cannot stream, by the mode that it asks for; None if it can."""
    if asked in ("greedy_search", "sample"):
        return None
    return (
        f"streaming serves greedy search and sampling, but the call asks for {asked.replace('_', ' ')}, which takes tokens "
        "back or has rows go on as others; patch the model without streaming for it"
    )
