"""What users change in a model between calls, by name; the same change on both sides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch


def decoder_of(model: Any) -> Any:
    """The module that has the layers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    while not hasattr(decoder, "layers"):
        decoder = getattr(decoder, "language_model", None) or decoder.model
    return decoder


def place(model: Any, name: str, layer: int) -> Any:
    """The module for one of `draw.PLACES`."""
    decoder = decoder_of(model)
    layer = decoder.layers[layer % len(decoder.layers)]
    attention = getattr(layer, "self_attn", None) or layer.linear_attn
    places: dict[str, Callable[[], Any]] = {
        "decoder": lambda: decoder,
        "layer": lambda: layer,
        "attention": lambda: attention,
        "mlp": lambda: layer.mlp,
        "q_proj": lambda: getattr(attention, "q_proj", attention),
        "lm_head": lambda: model.get_output_embeddings() or model.lm_head,
        "embeddings": model.get_input_embeddings,
        "model": lambda: model,
    }
    return places[name]()


def _weights(model: Any, step: dict[str, Any]) -> None:
    with torch.no_grad():
        decoder_of(model).layers[0].mlp.apply(_scale)


def _scale(module: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.mul_(1.1)


def _norm(model: Any, step: dict[str, Any]) -> None:
    with torch.no_grad():
        decoder_of(model).norm.weight.mul_(1.3)


def _copy_layer(model: Any, step: dict[str, Any]) -> None:
    """A plain copy of the same layer in its place."""
    layers, at = decoder_of(model).layers, step["layer"]
    layers[at] = copy.deepcopy(layers[at])


def _swap_layers(model: Any, step: dict[str, Any]) -> None:
    layers = decoder_of(model).layers
    layers[0], layers[-1] = layers[-1], layers[0]


def _append_layer(model: Any, step: dict[str, Any]) -> None:
    """A copy of a layer on top of the others."""
    layers = decoder_of(model).layers
    layer = copy.deepcopy(layers[-1])
    if hasattr(layer, "self_attn"):
        layer.self_attn.layer_idx = len(layers)
    layers.append(layer)
    config = model.config.get_text_config(decoder=True)
    config.num_hidden_layers += 1
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, config.layer_types[-1]]


def _window(model: Any, step: dict[str, Any]) -> None:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "sliding_window", None):
        config.sliding_window = 7
        for layer in decoder_of(model).layers:
            attention = getattr(layer, "self_attn", None)
            if getattr(attention, "sliding_window", None):
                attention.sliding_window = 7


def _is_causal(model: Any, step: dict[str, Any]) -> None:
    attention = getattr(decoder_of(model).layers[step["layer"]], "self_attn", None)
    if attention is not None:
        attention.is_causal = False


def _head(model: Any, step: dict[str, Any]) -> None:
    head = model.get_output_embeddings() or model.lm_head
    with torch.no_grad():
        head.weight.copy_(head.weight.flip(1).clone())


def _resize(model: Any, step: dict[str, Any]) -> None:
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 8, mean_resizing=False)


def _tie(model: Any, step: dict[str, Any]) -> None:
    (model.get_output_embeddings() or model.lm_head).weight = model.get_input_embeddings().weight


def _new_head(model: Any, step: dict[str, Any]) -> None:
    head = model.get_output_embeddings() or model.lm_head
    model.set_output_embeddings(torch.nn.Linear(head.in_features, head.out_features, bias=True, dtype=head.weight.dtype))


def _no_cache(model: Any, step: dict[str, Any]) -> None:
    model.generation_config.use_cache = False


def _rope(model: Any, step: dict[str, Any]) -> None:
    rotary = getattr(decoder_of(model), "rotary_emb", None)
    if rotary is not None:
        rotary.inv_freq.mul_(0.8)


def _scaling(model: Any, step: dict[str, Any]) -> None:
    attention = getattr(decoder_of(model).layers[step["layer"]], "self_attn", None)
    if hasattr(attention, "scaling"):
        attention.scaling *= 1.2


def _drop_layer(model: Any, step: dict[str, Any]) -> None:
    layers, config = decoder_of(model).layers, model.config.get_text_config(decoder=True)
    if len(layers) > 2:
        del layers[-1]
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: len(layers)]
        config.num_hidden_layers = len(layers)


def _assign(model: Any, step: dict[str, Any]) -> None:
    """New tensors in the place of all weights."""
    model.load_state_dict({name: tensor * 0.95 for name, tensor in model.state_dict().items()}, assign=True)


EDITS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "weights": _weights,
    "norm": _norm,
    "copy_layer": _copy_layer,
    "swap_layers": _swap_layers,
    "append_layer": _append_layer,
    "window": _window,
    "eager": lambda model, step: model.set_attn_implementation("eager"),
    "sdpa": lambda model, step: model.set_attn_implementation("sdpa"),
    "is_causal": _is_causal,
    "float64": lambda model, step: model.to(torch.float64),
    "float32": lambda model, step: model.to(torch.float32),
    "head": _head,
    "resize": _resize,
    "tie": _tie,
    "new_head": _new_head,
    "checkpointing": lambda model, step: model.gradient_checkpointing_enable(),
    "no_cache": _no_cache,
    "rope": _rope,
    "scaling": _scaling,
    "drop_layer": _drop_layer,
    "assign": _assign,
}
