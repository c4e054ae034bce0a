"""A prompt's layers in two halves of its tokens: while sums over ranks of one half are made, the other half is multiplied.

Attention, which tokens of one half need of the other, is computed at once for both. All else is done for a token by itself:

    q of the first half, and of the second; k, v; attention; o of the first, sum; o of the second, sum; MLP of the first, ...

so that a sum is made behind products of about its own length, or of several times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.static_inputs import most_tokens
from hf_fastattn.parallel.peer_memory import Delta
from hf_fastattn.parallel.shards import ROWS, local_of
from hf_fastattn.patches.attention.forward import attend_projected
from hf_fastattn.patches.family import LayerNames
from hf_fastattn.patches.fused.any_products import AnyProducts, PlainProducts
from hf_fastattn.patches.fused.experts import held_experts
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import is_plain, layers_of, linear_parameters, plain_shard
from hf_fastattn.patches.modules.product_layers import runs_our_forward

if TYPE_CHECKING:
    # It imports Triton.
    from hf_fastattn.patches.fused.products import Products

# Tokens of a prompt that is worth two products where there was one, and multiplications of a layer by its tokens on a rank:
# fewer take a GPU less time than the launches take the host. Of Llama-3-8B on two H200, 5,500 tokens: 8,192 took 126.8 ms
# instead of 135.2, and 4,096, whose launches took longer, 72.5 instead of 65.7.
FEWEST_TOKENS, FEWEST_PRODUCTS = 2048, 6 * 10**11
# A half begins at a multiple of so many tokens, as tiles of products do.
TILE = 256
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
Halves: TypeAlias = "tuple[Products, Products]"
Mlp: TypeAlias = "Callable[[Any, Tensor, Delta, Products], tuple[Tensor, Delta]]"


def halves_from(decoder: Any, tokens: int) -> int:
    """From how many tokens on a prompt is computed in halves, as far as this rank's modules go; 0 if it never is.

    `tokens`: of the call's prompts; for as few as never need it the modules are not looked at.
    """
    names = vars(decoder)[STATE].family.layers
    if names is None or tokens < FEWEST_TOKENS:
        return 0
    layers = list(layers_of(decoder))
    if not all(_takes_halves(layer, names, decoder.device, decoder.dtype) for layer in layers):
        return 0
    return max(FEWEST_TOKENS, FEWEST_PRODUCTS // _weights_of(layers[0]))


def _takes_halves(layer: Any, names: LayerNames, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all that the layer does with a token but attention, or its sums, is computed here and not called."""
    modules = layer._modules
    attention, mlp = modules.get("self_attn"), modules["mlp"]
    if attention is None or not runs_our_forward(attention, device):
        return False
    inner = attention._modules
    if any(linear_parameters(inner[name], device, (dtype,)) is None for name in PROJECTIONS):
        return False
    if not _is_summed(inner["o_proj"]):
        return False
    if is_plain(mlp, names.mlp, device):
        return "act_fn" in mlp._modules and _is_summed(mlp._modules["down_proj"])
    held = held_experts(mlp, names, device, dtype)
    return held is not None and held.group is not None


def _weights_of(layer: Any) -> int:
    """Weights that a token is multiplied with on this rank: of experts those of as many as it chooses."""
    weights = [local_of(weight) for weight in layer.parameters()]
    chosen = getattr(layer._modules["mlp"]._modules.get("gate"), "top_k", 1)
    return sum(weight.numel() if weight.ndim < 3 else weight[0].numel() * chosen for weight in weights)


def _is_summed(linear: Any) -> bool:
    part = plain_shard(linear)
    return part is not None and part.kind == ROWS


def halves_of(
    decoder: Any,
    products: AnyProducts,
    cache: PagedCache,
    states: Tensor,
    make_products: Callable[[tuple[int, ...], torch.device], AnyProducts],
) -> Callable[[], Halves] | None:
    """What makes the operations on each half of a prompt's tokens; None if it is computed whole.

    Every rank decides alike: by sizes, and by what all ranks found of their modules before the prompt.

    Args:
        decoder: whose layers are walked.
        products: of all tokens.
        states: `[B, S, hidden]`, what the first layer is given.
    """
    runtime = vars(decoder)[STATE].runtime
    call, batch, tokens = runtime.current, cache.paged_batch, products.tokens
    if call is None or not 0 < call.halves_from <= tokens or batch is None or batch.is_decode:
        return None
    if isinstance(products, PlainProducts) or products.narrowed or states.dtype is not decoder.dtype:
        return None
    # A graph would wait for events of sums that were made before it.
    if tokens <= most_tokens(decoder):
        return None
    first = -(-tokens // (2 * TILE)) * TILE
    later = runtime.ranks.later_sums(first, states.shape[-1], states.dtype)
    if later is None:
        return None

    def make() -> Halves:
        halves: Any = tuple(make_products((1, count), states.device) for count in (first, tokens - first))
        for half in halves:
            half.later = later
        return halves

    return make


def run_in_halves(
    layers: Iterable[Any],
    x: Tensor,
    products: Halves,
    cache: PagedCache,
    positions: dict[str, Any],
    mlp: Mlp,
) -> tuple[list[Tensor], list[Delta]]:
    """What layers make of `x: [T, hidden]`: the residual stream of each half, and what the next norm is to add to it.

    Args:
        layers: whose attention runs our forward.
        products: of each half's tokens, whose sums are made later.
        cache: with a paged batch of all tokens under way.
        positions: of all tokens, as attention takes them.
        mlp: a layer's second part, of some tokens.
    """
    counts = [half.tokens for half in products]
    streams, deltas = list(x.split(counts)), list[Any]([None, None])
    for layer in layers:
        modules = layer._modules
        module, norm = modules["self_attn"], modules["input_layernorm"]
        inner = module._modules
        linears = [inner[name] for name in PROJECTIONS]
        normed = torch.empty_like(x)
        q, k, v = (x.new_empty(len(x), _rows_of(linear, x)) for linear in linears)
        for half, (states, out) in enumerate(zip(normed.split(counts), q.split(counts), strict=True)):
            streams[half] = products[half].norm_to(states, norm, streams[half], deltas[half])
            products[half].multiply_to(out, linears[0], states)
        # Heads of keys are few: half the tokens would leave multiprocessors idle.
        products[0].multiply_to(k, linears[1], normed)
        products[0].multiply_to(v, linears[2], normed)
        attended = attend_projected(module, q, k, v, cache=cache, **positions).split(counts)
        # An MLP's activations are the largest: nothing is kept beside them.
        del normed, q, k, v
        for half in (0, 1):
            streams[half], deltas[half] = products[half].add_product(inner["o_proj"], attended[half], streams[half])
        del attended
        for half in (0, 1):
            streams[half], deltas[half] = mlp(layer, streams[half], deltas[half], products[half])
    return streams, deltas


def _rows_of(linear: Any, x: Tensor) -> int:
    held = linear_parameters(linear, x.device, (x.dtype,))
    assert held is not None
    return held[0].shape[0]
