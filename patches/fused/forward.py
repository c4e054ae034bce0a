"""The decoder's forward with fused layers, in place of the original one; the original where that is not possible."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from hf_fastattn.autocast import region_dtype
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.fingerprint import has_experts
from hf_fastattn.graphs.module_checks import has_global_hooks
from hf_fastattn.graphs.placement import SEVERAL, place_of, route_of
from hf_fastattn.graphs.weight_copies import WeightCopies
from hf_fastattn.kernels.backends import choose_backend, gluon_experts
from hf_fastattn.kernels.launch import DTYPES, MIN_HEAD_DIM
from hf_fastattn.pages.model_layout import key_shape
from hf_fastattn.patches.family import LayerNames
from hf_fastattn.patches.fused.any_products import AnyProducts
from hf_fastattn.patches.fused.expert_blocks import blocks_with
from hf_fastattn.patches.fused.layers import walk
from hf_fastattn.patches.fused.linear import why_not_delta
from hf_fastattn.patches.fused.plain_products import PlainProducts
from hf_fastattn.patches.modules.checkpointing import cache_kept, drops_cache
from hf_fastattn.patches.modules.module_state import call_original
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.plain_modules import is_plain_layer, layers_of, written_module
from hf_fastattn.transformers_version import CACHE

if TYPE_CHECKING:
    from hf_fastattn.patches.fused.adapter_stacks import TokenAdapters

# Arguments that the walk over the layers takes, and options that change nothing if they have these values.
TAKEN = {"input_ids", "inputs_embeds", "position_ids", "attention_mask", "return_dict", "use_cache"}
NO_LAYERS = LayerNames("", "", "")
OPTIONS = ("output_hidden_states", "output_attentions", "output_router_logits")


def fused_forward(
    decoder: Any,
    cache: PagedCache,
    copies: WeightCopies | None = None,
    adapters: TokenAdapters | None = None,
    called: bool = False,
    **arguments: Any,
) -> Any:
    """The decoder's forward over pages: fused if `fused_reason` has none against it, else the original.

    Args:
        decoder: patched.
        cache: with a paged batch under way.
        copies: of weights that autocast would cast, if there are any.
        adapters: of the tokens, if they have more than the layers' single ones; only where `why_not_fused` has no reason.
        called: the layers are to be called, whether or not they could be fused.
        arguments: of the original forward, packed.

    Returns:
        What the original returns.
    """
    if called or cache.paged_batch is None or why_not_walked(decoder, arguments) is not None:
        with cache_kept(decoder), _blocks(decoder, cache, arguments):
            return call_original(decoder, cache, **arguments)
    with _blocks(decoder, cache, arguments):
        hidden = walk(
            decoder,
            _maker(decoder, copies, adapters),
            cache,
            arguments.get("input_ids"),
            arguments.get("inputs_embeds"),
            arguments.get("position_ids"),
            arguments.get("attention_mask"),
        )
    mixture = vars(decoder)[STATE].family.layers.mixture
    kind = BaseModelOutputWithPast if mixture is None else MoeModelOutputWithPast
    outputs = kind(last_hidden_state=hidden, **{CACHE: cache})
    wanted = arguments.get("return_dict")
    return outputs.to_tuple() if (decoder.config.return_dict if wanted is None else wanted) is False else outputs


def fused_reason(decoder: Any) -> str | None:
    """Why our kernels do not run the layers of a patched decoder; None if they are fused.

    A fused layer still calls those of its modules that are not plain: see `modules.plain_modules`.

    Raises:
        ValueError: the backend that was asked for cannot run where the model is.
    """
    backend, why = _backend(decoder)
    unknown = _why_not_known(decoder)
    return unknown or (why if backend == "reference" else _why_not_walked(decoder))


def _backend(decoder: Any) -> tuple[str, str]:
    # Norms and products need the kernels only; so does attention, and it is one choice for both.
    options = vars(decoder)[STATE].runtime.config
    heads = (decoder.device, decoder.dtype, key_shape(decoder.config)[1])
    return choose_backend(options.backend, *heads, options.batch_invariant)


def _maker(
    decoder: Any, copies: WeightCopies | None, adapters: TokenAdapters | None
) -> Callable[[tuple[int, ...], torch.device], AnyProducts]:
    """What makes the operations of a forward: of our kernels, or of PyTorch's where these do not run."""
    names = vars(decoder)[STATE].family.layers
    backend = _backend(decoder)[0]
    if backend == "reference":
        return lambda leading, device: PlainProducts(names, leading)
    # Not before: it imports Triton.
    from hf_fastattn.patches.fused.products import Products

    ranks = vars(decoder)[STATE].runtime.ranks
    peers = None if ranks is None else ranks.peers
    return lambda leading, device: Products(names, leading, device, copies, adapters, gluon_experts(backend), peers)


def _blocks(decoder: Any, cache: PagedCache, arguments: dict[str, Any]) -> AbstractContextManager[None]:
    """A block in which the expert blocks of layers that are called run on our kernels, if they may."""
    state, names = vars(decoder)[STATE], vars(decoder)[STATE].family.blocks
    if names is None or cache.paged_batch is None or _backend(decoder)[0] == "reference":
        return nullcontext()
    unwanted = has_global_hooks() or torch.is_grad_enabled() or region_dtype(decoder.device) is not None
    if unwanted or _asked_for(decoder) is not None or why_not_these(decoder, arguments) is not None:
        return nullcontext()
    # Not before: it imports Triton.
    from hf_fastattn.patches.fused.products import Products

    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    return blocks_with(state.runtime, Products(names, tuple(tokens.shape[:2]), tokens.device))


def _why_not_known(decoder: Any) -> str | None:
    family = vars(decoder)[STATE].family
    return None if family.layers is not None else f"the layers of {family.model_type} are not known to be Llama's"


def _why_not_walked(decoder: Any) -> str | None:
    """Why the layers of a patched decoder run as Transformers wrote them; None if we walk through them."""
    names, unknown = vars(decoder)[STATE].family.layers, _why_not_known(decoder)
    if names is None or unknown is not None:
        return unknown
    if calls_layers(decoder):
        return "batch_invariant=True: layers add up as Transformers wrote them"
    if has_global_hooks():
        return "hooks on all modules are registered"
    if drops_cache(decoder):
        return "gradient checkpointing is on"
    asked = _asked_for(decoder)
    if asked is not None:
        return asked
    # The model's own device and dtype are looked for among all its parameters.
    own = place = decoder.device
    for layer in layers_of(decoder):
        place = place_of(layer, place)
        if not is_plain_layer(layer, names.layer, place):
            return f"a {type(layer).__name__} was replaced or has hooks"
        linear = layer._modules.get("linear_attn")
        if linear is not None:
            reason = (
                "a linear attention" if names.delta is None else why_not_delta(linear, names.delta, place, decoder.dtype)
            )
            if reason is not None:
                return reason
    route = route_of(decoder, None, own)
    return _why_not_spread(decoder, route) if len(route) > 1 else None


def _why_not_spread(decoder: Any, route: tuple[torch.device, ...]) -> str | None:
    """Why layers on several devices are called; None if we walk through them."""
    if vars(decoder)[STATE].family.linear_attention or has_experts(decoder):
        return SEVERAL
    options, heads = vars(decoder)[STATE].runtime.config, key_shape(decoder.config)[1]
    backends = {choose_backend(options.backend, place, decoder.dtype, heads, options.batch_invariant)[0] for place in route}
    return "the devices that the layers are on take different kernels" if len(backends) > 1 else None


def calls_layers(decoder: Any) -> bool:
    """Whether batch-invariant mode has layers and `lm_head` called, so that products add up in one order in all forwards.

    Only dense layers on one device: steps of others could not be recorded then.
    """
    state = vars(decoder)[STATE]
    runtime, family = state.runtime, state.family
    if not runtime.config.batch_invariant or runtime.ranks is not None or family.linear_attention:
        return False
    return (family.layers is None or family.layers.mixture is None) and len(route_of(decoder, None, decoder.device)) == 1


def why_not_walked(decoder: Any, arguments: dict[str, Any]) -> str | None:
    """Why a paged forward with these arguments calls the layers of a patched decoder; None if we walk through them."""
    return _why_not_walked(decoder) or why_not_these(decoder, arguments)


def _asked_for(decoder: Any) -> str | None:
    """The output of every layer that the configuration asks for, as a reason."""
    return next((f"{option} is set" for option in OPTIONS if getattr(decoder.config, option, False)), None)


def fused_logits(
    lm_head: nn.Module, hidden: Tensor, copies: WeightCopies | None = None, adapters: TokenAdapters | None = None
) -> Tensor:
    """`lm_head(hidden)`, by our product where that is a plain linear layer and ours is quicker.

    Args:
        lm_head: the model's output layer.
        hidden: `[T, hidden]` after the last norm.
        copies: of weights that autocast would cast, if there are any.
        adapters: of the tokens, if they have more than the layer's single one.

    Returns:
        `[T, vocabulary]`, under autocast in its dtype.
    """
    grads = torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in lm_head.parameters()))
    if grads or has_global_hooks():
        return lm_head(hidden)
    region = region_dtype(hidden.device)
    dtype = region or hidden.dtype
    # lm_head has no head dimension; the smallest supported one stands for it.
    if dtype not in DTYPES or choose_backend("auto", hidden.device, dtype, MIN_HEAD_DIM)[0] == "reference":
        return lm_head(hidden)
    # Not before: it imports Triton.
    from hf_fastattn.patches.fused.products import Products

    products = Products(NO_LAYERS, (hidden.shape[0],), hidden.device, copies, adapters)
    return products.product(written_module(lm_head), hidden)


def step_logits(model: Any, hidden: Tensor) -> Tensor:
    """`fused_logits` of a patched model without copies and adapters, `[T, vocabulary]`; `lm_head` where it is called."""
    called = calls_layers(model._fastattn.decoder(model))
    return model.lm_head(hidden) if called else fused_logits(model.lm_head, hidden)


def why_not_fused(decoder: Any, arguments: dict[str, Any]) -> str | None:
    """Why a paged forward of the decoder with these arguments needs the original."""
    return fused_reason(decoder) or why_not_these(decoder, arguments)


def why_not_these(decoder: Any, arguments: dict[str, Any]) -> str | None:
    """What of these arguments the walk over the layers does not take, as a reason."""
    for name, value in arguments.items():
        if name not in TAKEN and value is not None and value is not False and (name, value) != ("is_causal", True):
            return f"{name} is given"
    use_cache = arguments.get("use_cache")
    if not (decoder.config.use_cache if use_cache is None else use_cache):
        return "use_cache is off"
    embeds, tokens = arguments.get("inputs_embeds"), arguments.get("input_ids")
    given = tokens if embeds is None else embeds
    if given is None:
        return "no tokens"
    region = region_dtype(given.device)
    if region not in (None, torch.bfloat16, torch.float16):
        return f"autocast to {region}"
    if torch.is_grad_enabled() and given.requires_grad:
        return "gradients are needed"
    return None
