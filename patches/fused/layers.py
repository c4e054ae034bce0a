"""A decoder's layers, walked: embedding, RoPE tables, then norm, attention, norm, MLP of every layer, and the last norm.

Layers may be on several devices: hidden states go on from one to the next as accelerate's hooks would send them, and
everything else that layers need is made on each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.placement import place_of
from hf_fastattn.kernels.launch import on_device_of
from hf_fastattn.parallel.all_reduce import embedding
from hf_fastattn.parallel.later_sums import LaterSum
from hf_fastattn.parallel.peer_memory import Delta, PeerSum
from hf_fastattn.parallel.shards import VOCABULARY
from hf_fastattn.patches.attention.forward import attend_projected
from hf_fastattn.patches.fused.any_products import AnyProducts
from hf_fastattn.patches.fused.experts import by_batched_mm, held_experts, runs_batched
from hf_fastattn.patches.fused.halves import Halves, halves_of, run_in_halves
from hf_fastattn.patches.fused.linear import add_delta
from hf_fastattn.patches.fused.plain_products import PlainProducts
from hf_fastattn.patches.fused.positions import attention_positions
from hf_fastattn.patches.fused.rehearse import rehearse
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import is_plain, layers_of, plain_shard, written_module
from hf_fastattn.patches.modules.product_layers import runs_our_forward
from hf_fastattn.transformers_version import CACHE


def walk(
    decoder: Any,
    make_products: Callable[[tuple[int, ...], torch.device], AnyProducts],
    cache: PagedCache,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Any,
) -> Tensor:
    """Hidden states after the last norm.

    Args:
        decoder: whose layers are those that its family describes.
        make_products: operations on tokens of a leading shape, on a device.
        cache: with a paged batch under way.
        input_ids: `[B, S]`, or else `inputs_embeds: [B, S, hidden]`.
        position_ids: `[1 or B, S]`, or with axes in front; those that follow the cache by default.
        attention_mask: for attention modules that have to be called.

    Returns:
        `[B, S, hidden]`.
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    states = _embedded(decoder.embed_tokens, input_ids) if inputs_embeds is None else inputs_embeds
    place = place_of(decoder.embed_tokens, given.device) if inputs_embeds is None else given.device
    if position_ids is None:
        past = cache.past_columns
        position_ids = torch.arange(past, past + states.shape[1], device=states.device)[None]
    leading, runtime = tuple(states.shape[:-1]), vars(decoder)[STATE].runtime
    products = make_products(leading, states.device)
    ours = not isinstance(products, PlainProducts)
    positions = attention_positions(decoder, cache, states, position_ids, place, ours)
    make_halves = halves_of(decoder, products, cache, states, make_products)
    if ours:

        def rehearsed(layers: Iterable[Any], states: Tensor, positions: dict[str, Any]) -> None:
            if make_halves is not None and tuple(states.shape[:-1]) == leading:
                _in_halves(decoder, layers, states.flatten(0, -2), make_halves(), cache, positions)
                return
            again = make_products(tuple(states.shape[:-1]), states.device)
            x, delta = _run(layers, states.flatten(0, -2), None, again, cache, positions, attention_mask)
            if place_of(decoder.norm, place) == place:
                again.norm(written_module(decoder.norm), x, delta)

        rehearse(decoder, cache, states, positions, rehearsed)
    if make_halves is not None:
        with on_device_of(states):
            halves = make_halves()
            hidden = _in_halves(decoder, layers_of(decoder), states.flatten(0, -2), halves, cache, positions)
        for half in halves:
            runtime.counters.count_products(half.adapters_fused, half.quantised_products)
        return hidden.view(*states.shape)
    x, delta = states.flatten(0, -2), cast(Delta, None)
    for wanted, layers in _by_place(decoder, place):
        if wanted != place:
            runtime.counters.count_products(products.adapters_fused, products.quantised_products)
            # A model that is spread over ranks is on one device in each.
            assert not isinstance(delta, PeerSum | LaterSum)
            place, (x, delta) = wanted, cache.go_on(wanted, x, delta)
            products = make_products(leading, x.device)
            if layers:
                there = cache.positions_on(wanted, position_ids)
                positions = attention_positions(decoder, cache, x.view(*leading, -1), there, wanted, ours)
                attention_mask = _mask_on(x.device, attention_mask)
        # Each launch would look for its device and switch to it.
        with on_device_of(x):
            x, delta = _run(layers, x, delta, products, cache, positions, attention_mask)
    out = products.norm(written_module(decoder.norm), x, delta)[0]
    runtime.counters.count_products(products.adapters_fused, products.quantised_products)
    return out.view(*states.shape)


def _by_place(decoder: Any, given: torch.device) -> Iterator[tuple[torch.device, list[Any]]]:
    """Layers that stand behind each other on one device, with it; at last the device of the last norm, with those before."""
    place, layers = given, list[Any]()
    for layer in layers_of(decoder):
        wanted = place_of(layer, place)
        if wanted != place and layers:
            yield place, layers
            layers = []
        place = wanted
        layers.append(layer)
    yield place, layers
    wanted = place_of(written_module(decoder.norm), place)
    if wanted != place:
        yield wanted, []


def _mask_on(device: torch.device, mask: Any) -> Any:
    """A mask that nobody reads, on another device; those of a forward over pages have one element."""
    return mask.new_zeros(mask.shape, device=device) if isinstance(mask, Tensor) else mask


def _run(
    layers: Iterable[Any],
    x: Tensor,
    delta: Delta,
    products: AnyProducts,
    cache: PagedCache,
    positions: dict[str, Any],
    attention_mask: Any,
) -> tuple[Tensor, Delta]:
    """What layers of the decoder make of `x: [T, hidden]` and of what the next norm is to add to it."""
    is_step = cache.paged_batch is not None and cache.paged_batch.is_decode
    if not isinstance(products, PlainProducts):
        products.batch = cache.paged_batch
    for layer in layers:
        x, delta = _attention(layer, x, delta, products, cache, positions, attention_mask)
        x, delta = _mlp(layer, x, delta, products, is_step)
    return x, delta


def _in_halves(
    decoder: Any, layers: Iterable[Any], x: Tensor, halves: Halves, cache: PagedCache, positions: dict[str, Any]
) -> Tensor:
    """Hidden states after the last norm, `[T, hidden]`, computed in two halves."""
    streams, deltas = run_in_halves(layers, x, halves, cache, positions, functools.partial(_mlp, is_step=False))
    norm = written_module(decoder.norm)
    found = [half.norm(norm, one, delta)[0] for half, one, delta in zip(halves, streams, deltas, strict=True)]
    return torch.cat(found)


def _embedded(module: Any, input_ids: Tensor | None) -> Any:
    """`module(input_ids)`, `[B, S, hidden]`; of a vocabulary that is spread over ranks without DTensors on the way."""
    part = plain_shard(module)
    if part is None or part.kind != VOCABULARY or input_ids is None:
        return module(input_ids)
    return embedding(input_ids, part.weight, part.size, part.group)


def _attention(
    layer: Any,
    x: Tensor,
    delta: Delta,
    products: AnyProducts,
    cache: PagedCache,
    positions: dict[str, Any],
    attention_mask: Any,
) -> tuple[Tensor, Delta]:
    # Not by attribute, which costs the host half a microsecond each.
    modules = layer._modules
    if "linear_attn" in modules:
        return add_delta(modules["linear_attn"], modules["input_layernorm"], x, delta, products, cache)
    module, norm = modules["self_attn"], modules["input_layernorm"]
    if not runs_our_forward(module, x.device):
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


def _mlp(layer: Any, x: Tensor, delta: Delta, products: AnyProducts, is_step: bool) -> tuple[Tensor, Delta]:
    mlp, norm = layer._modules["mlp"], layer._modules["post_attention_layernorm"]
    if not isinstance(products, PlainProducts):
        held = None if products.narrowed else held_experts(mlp, products.names, x.device, x.dtype)
        if held is not None:
            # Not before: it imports Triton.
            from hf_fastattn.patches.fused.mixture import add_mixture

            return add_mixture(mlp, held, norm, x, delta, products)
    # A function in the place of the activation is no module of it.
    inner = mlp._modules
    if "act_fn" not in inner or not is_plain(mlp, products.names.mlp, x.device):
        normed, x = products.norm(norm, x, delta)
        switched = is_step and x.device.type != "cpu" and runs_batched(mlp, products.names, x.device)
        with by_batched_mm(mlp) if switched else nullcontext():
            return x, products.call(mlp, normed)
    states, x = products.gated(norm, inner["gate_proj"], inner["up_proj"], inner["act_fn"], x, delta)
    return products.add_product(inner["down_proj"], states, x)
