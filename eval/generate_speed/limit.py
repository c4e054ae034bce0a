"""The bytes that a decode step cannot avoid reading: its limit on a device whose memory is the bottleneck."""

from __future__ import annotations

from typing import Any

from hf_fastattn.eval.generate_speed.cases import Case
from hf_fastattn.eval.generate_speed.experts import expected_experts, experts_of
from hf_fastattn.pages.model_layout import is_pageable, is_recurrent, key_shape, layer_window, template_layers
from hf_fastattn.parallel.shards import local_of

# What a module of experts holds of all of them.
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def weight_bytes(model: Any, rows: float, distinct: float | None = None) -> float:
    """Bytes of the weights that a step of `rows` tokens reads: the decoder's and the head's; of an embedding table only
    if it is the head, and of experts `distinct` a layer, by default those that the tokens are expected to choose. Of a
    model that is spread over ranks, those of this rank's parts."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    held = {id(weight): (name, weight) for name, weight in (*model.get_decoder().named_parameters(), ("head", head))}
    if table is not head:
        held.pop(id(table), None)
    experts = experts_of(model)
    share = 1.0
    if experts is not None:
        share = (expected_experts(*experts, rows) if distinct is None else distinct) / experts[0]
    return sum(local_of(weight).nbytes * (share if name.endswith(EXPERTS) else 1) for name, weight in held.values())


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


def state_bytes(model: Any, rows: float) -> float:
    """Bytes that a step of `rows` rows reads and writes of the states of linear-attention layers, which are in fp32."""
    text = model.config.get_text_config(decoder=True)
    layers = sum(map(is_recurrent, template_layers(model.config)))
    if not layers:
        return 0.0
    state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
    return 2 * rows * layers * state * 4


def step_limit(model: Any, case: Case, new: int, read: float, distinct: float | None = None) -> float:
    """Seconds of a step that does nothing but read, at `read` bytes a second, and write the states of linear attention.

    `distinct`: experts a layer that the tokens chose, if they were counted.
    """
    live = sum(case.steps(new)) / new
    return (weight_bytes(model, live, distinct) + key_value_bytes(model, case, new) + state_bytes(model, live)) / read
