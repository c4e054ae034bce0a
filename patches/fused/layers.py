"""A decoder's layers, walked: embedding, RoPE tables, then norm, attention, norm, MLP of every layer, and the last norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.module_checks import is_our_forward
from hf_fastattn.graphs.weight_copies import WeightCopies
from hf_fastattn.patches.attention.forward import attend_projected
from hf_fastattn.patches.family import LayerNames
from hf_fastattn.patches.fused.experts import held_experts
from hf_fastattn.patches.fused.mixture import add_mixture
from hf_fastattn.patches.fused.products import Products
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import has_no_foreign_hooks, is_plain, layers_of
from hf_fastattn.transformers_version import CACHE


def walk(
    decoder: Any,
    names: LayerNames,
    cache: PagedCache,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Any,
    copies: WeightCopies | None = None,
) -> Tensor:
    """Hidden states after the last norm.

    Args:
        decoder: whose layers are those that `names` describes.
        cache: with a paged batch under way.
        input_ids: `[B, S]`, or else `inputs_embeds: [B, S, hidden]`.
        position_ids: `[1 or B, S]`; those that follow the cache by default.
        attention_mask: for attention modules that have to be called.
        copies: of weights that autocast would cast, if there are any.

    Returns:
        `[B, S, hidden]`.
    """
    states = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if position_ids is None:
        past = cache.get_seq_length()
        position_ids = torch.arange(past, past + states.shape[1], device=states.device)[None]
    position_embeddings = decoder.rotary_emb(states, position_ids=position_ids)
    products = Products(names, tuple(states.shape[:-1]), states.device, copies)
    positions = {"position_embeddings": position_embeddings, "position_ids": position_ids}
    x, delta = states.reshape(-1, states.shape[-1]), None
    for layer in layers_of(decoder):
        x, delta = _attention(layer, x, delta, products, cache, positions, attention_mask)
        x, delta = _mlp(layer, x, delta, products)
    out, _ = products.norm(decoder.norm, x, delta)
    vars(decoder)[STATE].runtime.counters.adapters_fused += products.adapters_fused
    return out.view(*states.shape)


def _attention(
    layer: Any,
    x: Tensor,
    delta: Tensor | None,
    products: Products,
    cache: PagedCache,
    positions: dict[str, Any],
    attention_mask: Any,
) -> tuple[Tensor, Tensor | None]:
    # Not by attribute, which costs the host half a microsecond each.
    modules = layer._modules
    module, norm = modules["self_attn"], modules["input_layernorm"]
    if not _is_plain_attention(module):
        normed, x = products.norm(norm, x, delta)

        def attend(states: Tensor) -> Any:
            return module(
                hidden_states=states,
                attention_mask=attention_mask,
                **{CACHE: cache},
                use_cache=True,
                **positions,
            )

        return x, products.call(attend, normed)
    inner = module._modules
    (q, k, v), x = products.project(norm, (inner["q_proj"], inner["k_proj"], inner["v_proj"]), x, delta)
    out = attend_projected(module, q, k, v, cache=cache, **positions)
    return products.add_product(inner["o_proj"], out, x)


def _is_plain_attention(module: Any) -> bool:
    """Whether calling the module runs our forward, and nothing before or after it."""
    state = vars(module)
    return (
        STATE in state
        and is_our_forward(module.forward)
        and "_hf_hook" not in state
        and state.get("_compiled_call_impl") is None
        and has_no_foreign_hooks(module)
    )


def _mlp(layer: Any, x: Tensor, delta: Tensor | None, products: Products) -> tuple[Tensor, Tensor | None]:
    mlp, norm = layer._modules["mlp"], layer._modules["post_attention_layernorm"]
    held = None if products.narrowed else held_experts(mlp, products.names, x.device, x.dtype)
    if held is not None:
        return add_mixture(mlp, held, norm, x, delta, products)
    if not is_plain(mlp, products.names.mlp):
        normed, x = products.norm(norm, x, delta)
        return x, products.call(mlp, normed)
    inner = mlp._modules
    states, x = products.gated(norm, inner["gate_proj"], inner["up_proj"], inner["act_fn"], x, delta)
    return products.add_product(inner["down_proj"], states, x)
