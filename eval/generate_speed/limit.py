"""The bytes that a decode step cannot avoid reading: its limit on a device whose memory is the bottleneck."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.pages.model_layout import is_pageable, key_shape, layer_window, template_layers


def weight_bytes(model: Any) -> int | None:
    """Bytes of the weights that a step reads: the decoder's and the head's; of an embedding table only if it is the head.

    None for a mixture of experts, where what is read depends on the tokens.
    """
    if any("experts" in name for name, _ in model.named_parameters()):
        return None
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    held = {id(weight): weight for weight in (*model.get_decoder().parameters(), head)}
    if table is not head:
        held.pop(id(table), None)
    return sum(weight.nbytes for weight in held.values())


def key_value_bytes(model: Any, case: Case, new: int) -> float:
    """Bytes of keys and values that one of the `new` steps after the first token reads, on average.

    A prompt that rows share counts once, and a row that has ended no more.
    """
    groups, dim = key_shape(model.config)
    steps = case.steps(new)
    live = sum(steps) / new
    written = sum(count * (count + 1) / 2 for count in steps) / new
    tokens = 0.0
    for layer in template_layers(model.config):
        if is_pageable(layer):
            window = layer_window(layer)
            if window is not None and case.prompt + written / live > window:
                tokens += live * window
            else:
                tokens += case.prompt * (live if case.prompts == case.rows else case.prompts) + written
    return tokens * 2 * groups * dim * model.dtype.itemsize


def step_limit(model: Any, case: Case, new: int, read: float) -> float | None:
    """Seconds of a step that does nothing but read, at `read` bytes a second; None if that is not known."""
    weights = weight_bytes(model)
    return None if weights is None else (weights + key_value_bytes(model, case, new)) / read
