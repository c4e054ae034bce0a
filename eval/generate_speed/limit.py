"""The bytes that a decode step cannot avoid reading: its limit on a device whose memory is the bottleneck."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.pages.model_layout import is_pageable, key_shape, layer_window, template_layers

# What a module of experts holds of all of them.
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def distinct_experts(experts: int, top_k: int, rows: float) -> float:
    """How many experts `rows` tokens are expected to choose, if each chooses any `top_k` of them alike."""
    return experts * (1.0 - (1.0 - top_k / experts) ** rows)


def weight_bytes(model: Any, rows: float) -> float:
    """Bytes of the weights that a step of `rows` tokens reads: the decoder's and the head's; of an embedding table only
    if it is the head, and of experts those that the tokens are expected to choose."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    held = {id(weight): (name, weight) for name, weight in (*model.get_decoder().named_parameters(), ("head", head))}
    if table is not head:
        held.pop(id(table), None)
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", 0)
    return sum(
        weight.nbytes * (distinct_experts(len(weight), top_k, rows) / len(weight) if name.endswith(EXPERTS) else 1)
        for name, weight in held.values()
    )


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


def step_limit(model: Any, case: Case, new: int, read: float) -> float:
    """Seconds of a step that does nothing but read, at `read` bytes a second."""
    live = sum(case.steps(new)) / new
    return (weight_bytes(model, live) + key_value_bytes(model, case, new)) / read
