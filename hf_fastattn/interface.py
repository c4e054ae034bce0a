"""`attn_implementation="fastattn"`: our kernels for any model that calls Transformers' attention interface.

hf_fastattn.register()
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn")

Nothing of the model or its cache is replaced. As for `sdpa`, the mask alone says what a query sees (a `sliding_window`
that a model passes beside its mask is not needed): for causal and sliding attention behind left padding it is the 2-D
padding mask with a `CausalLayout`, made once a forward; anything else is Transformers' 4-D mask, and runs on its sdpa.

In Transformers' own continuous batching there is no mask: the pages of its cache are read where they lie
(`hf_fastattn/stock_batching/`).
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from hf_fastattn.dense.causal_layout import ATTRIBUTE, CausalLayout, layout_of, unpadded_mask, with_layout
from hf_fastattn.dense.choice import ONE_LAUNCH, SMALL_ON_CPU, why_stock, why_stock_is_enough
from hf_fastattn.dense.dense_attention import dense_attention
from hf_fastattn.dense.interface_counters import InterfaceCounters, counters
from hf_fastattn.dense.stock_attention import OneLaunch, stock_attention
from hf_fastattn.kernels.backends import choose_backend
from hf_fastattn.stock_batching.attention import PagedLayer, paged_layer_attention
from hf_fastattn.stock_batching.doors import NAME, NAMES, open_doors
from hf_fastattn.stock_batching.page_cache import LAYER, StockPages

__all__ = ["NAME", "InterfaceCounters", "attention_forward", "attention_mask", "counters", "register"]
# Inside a row the kernels count elements in 32 bits.
MAX_ROW_ELEMENTS = 2**31
logger = logging.getLogger("hf_fastattn")


def register() -> None:
    """Make `attn_implementation="fastattn"` known to Transformers in this process; again is a no-op.

    Call it before a model is loaded with that name, which is a `ValueError` of Transformers otherwise.
    """
    open_doors()
    for name in NAMES:
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)


def attention_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """The mask of one forward, for all layers of a kind; called by `create_causal_mask` and its like.

    Args:
        q_length: queries a row; they begin at position `q_offset`.
        kv_length: keys a row, room for tokens to come included; they begin at position `kv_offset`.
        kwargs: as for `transformers.masking_utils.sdpa_mask`.

    Returns:
        `[B, filled]` bool with its layout for plain causal or sliding attention behind left padding; else what
        `sdpa_mask` returns.

    Raises:
        ValueError: the model does not call the attention interface, and would take the mask for one of its own.
    """
    config: type = type(kwargs.get("config"))
    if not torch.compiler.is_compiling() and not _calls_interface(config):
        raise ValueError(
            f"models of {config.__name__} do not call Transformers' attention interface, so attn_implementation='fastattn' "
            "cannot reach them; load them with attn_implementation='eager'"
        )
    plain, window = _plain_pattern(kwargs)
    if plain:
        given, device = kwargs.get("attention_mask"), torch.device(kwargs.get("device", "cpu"))
        first = kwargs.get("kv_offset", 0)
        # A static cache counts its tokens on the device.
        filled = int(kwargs.get("q_offset", 0)) + q_length - first
        if q_length <= filled <= kv_length:
            mask = _padding_mask(batch_size, filled, first, kv_length, window, given, device)
            if mask is not None:
                return mask
    return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)


@functools.cache
def _calls_interface(config: type) -> bool:
    """False for a model whose own attention layers do not: Transformers checks that for its own names only."""
    module = sys.modules.get(config.__module__.replace("configuration_", "modeling_"))
    if module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return True
    own = (value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__)
    return not any(isinstance(cls, type) and issubclass(cls, torch.nn.Module) and "Attention" in cls.__name__ for cls in own)


def _plain_pattern(kwargs: dict[str, Any]) -> tuple[bool, int | None]:
    """Whether the pattern is causal or sliding and no more, and its window."""
    skip, local_size, config = kwargs.get("allow_is_causal_skip", True), kwargs.get("local_size"), kwargs.get("config")
    if not skip or kwargs.get("use_vmap") or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False, None
    if local_size is None:
        # An overlay on the causal pattern makes it another mask.
        return kwargs.get("mask_function", causal_mask_function) is causal_mask_function, None
    # Chunked attention sets `local_size` too.
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return getattr(config, "sliding_window", None) == local_size and not chunked, local_size


def _padding_mask(
    rows: int, filled: int, first: int, kv_length: int, window: int | None, given: Tensor | None, device: torch.device
) -> Tensor | None:
    """`[B, filled]` bool with its layout; None unless all padding of the mask `given` is on the left."""
    if given is None:
        layout: CausalLayout | None = CausalLayout.unpadded(rows, filled, device, kv_length, window)
        mask = unpadded_mask(rows, filled, device)
    else:
        held = layout_of(given)
        if held is not None and (held.filled, held.kv_length, held.window) == (filled, kv_length, window):
            # generate() prepares the masks of a static cache, and the model hands them in again.
            return given
        # What the mask does not reach is hidden, as in `sdpa_mask`.
        short, mask = first + filled - given.shape[1], given.expand(rows, -1)
        mask = (torch.nn.functional.pad(mask, (0, short)) if short > 0 else mask)[:, first : first + filled]
        layout = CausalLayout.of_mask(mask, kv_length, window)
    return None if layout is None else with_layout(mask, layout)


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function: our kernels, or Transformers' sdpa with the reason counted and logged once.

    Args:
        module: the model's attention module.
        query: `[B, H, S, D]` after RoPE.
        key: `[B, G, L, D]`, what the cache returned; `value` likewise.
        attention_mask: from the function above; None as for `sdpa`; a mask of four dimensions falls back.
        kwargs: `scaling`, `dropout`, `softcap`, `s_aux` (sinks) and others of the model.

    Returns:
        Output `[B, S, H, D]`, and None for the weights unless `output_attentions` is set.
    """
    mask = attention_mask
    known = None if torch.compiler.is_compiling() else getattr(mask, ATTRIBUTE, None)
    if known is not None and known.one_launch is not None and known.one_launch.fits(query, key, kwargs):
        counters.fallbacks[ONE_LAUNCH] += 1
        return known.one_launch.attend(module, query, key, value, kwargs), None
    batched = _layer_of_batch(module, key, value, kwargs)
    if batched is not None:
        return _attend_batched(batched, query, key, value, kwargs), None
    if known is not None and known.backends and not torch.is_grad_enabled():
        chosen = known.backends.get(_like(module, query, key, value, kwargs))
        if chosen is not None:
            return _attend(query, key, value, known, chosen, kwargs), None
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # Not needed where the mask has a layout or is 4-D: then the mask itself says what is visible.
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    layout = None
    if not torch.compiler.is_compiling():
        layout = None if mask is None else _layout(query, key, mask, causal, window)
        why, backend = why_stock(query, key, value, mask, causal, kwargs), ""
        if why is None and mask is not None and layout is None:
            why = "a padding mask that is not plain left padding of these queries and keys"
        why = why or why_stock_is_enough(module, query, key, layout, kwargs)
        if why is None:
            backend, why = _backend(query, key)
        if why is None:
            if layout is not None:
                layout.backends[_like(module, query, key, value, kwargs)] = backend
            layout = layout or CausalLayout.unpadded(query.shape[0], key.shape[2], query.device)
            return _attend(query, key, value, layout, backend, kwargs), None
        counters.fallbacks[why] += 1
        _log(why)
        if why is ONE_LAUNCH and layout is not None:
            layout.one_launch = OneLaunch.of(module, query, key, value, kwargs)
    if mask is not None and mask.ndim == 2:
        mask = _dense_mask(mask, query, key, causal, window) if layout is None else layout.dense_mask(query.shape[2])
    return stock_attention(module, query, key, value, mask, **kwargs)


def _layer_of_batch(module: Any, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> PagedLayer | None:
    """The layer in a forward of Transformers' continuous batching; None in any other."""
    if LAYER in kwargs:
        return kwargs[LAYER]
    # Before 5.24 not the model but its attention function calls the cache.
    cache = kwargs.get("cache")
    return cache.layer(key, value, module.layer_idx, kwargs) if isinstance(cache, StockPages) else None


@torch.compiler.disable
def _attend_batched(layer: PagedLayer, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """`[1, T, H, D]` of a layer of the above."""
    changed = not layer.is_gathered and (key is not layer.key or value is not layer.value)
    if changed or kwargs.get("position_bias") is not None:
        raise RuntimeError(
            "continuous batching with attn_implementation='fastattn' needs a model whose attention takes keys and values as "
            "its cache gave them, and no position_bias; load this one with attn_implementation='sdpa'"
        )
    backend, _ = choose_backend("auto", query.device, query.dtype, query.shape[-1])
    counters.kernels[backend] += 1
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    options = {"scale": scale, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    return paged_layer_attention(layer, query, backend=backend, **options)


def _like(module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All that a choice depends on beside the mask, where nothing needs gradients."""
    given = kwargs.get
    causal, groups = getattr(module, "is_causal", True), getattr(module, "num_key_value_groups", 1)
    options = (given("scaling"), given("softcap"), given("is_causal"), given("dropout"), given("output_attentions"))
    absent = (given("s_aux") is None, given("position_bias") is None, given("cache") is None)
    tensors = (query.shape, key.shape, value.shape, key.stride(), query.dtype, key.dtype, value.dtype, query.device)
    return causal, groups, *options, *absent, *tensors


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: CausalLayout, backend: str, kwargs: dict[str, Any]) -> Tensor:
    """`[B, S, H, D]` of our kernels."""
    counters.kernels[backend] += 1
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    options = {"backend": backend, "scale": scale, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    return dense_attention(query, key, value, layout, **options)


def _layout(query: Tensor, key: Tensor, mask: Tensor, causal: bool, window: int | None) -> CausalLayout | None:
    """What the queries see behind `mask`, if it is causal or sliding behind left padding; else None."""
    rows, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    layout = layout_of(mask) if mask.ndim == 2 else None
    if mask.ndim == 2 and layout is None and causal and mask.shape[1] <= keys:
        # A copy, as on another device where a model is split, has lost its layout.
        layout = CausalLayout.of_mask(mask, keys, window)
    fits = layout is not None and layout.rows == rows and layout.kv_length == keys and queries <= layout.filled
    return layout if fits else None


def _dense_mask(mask: Tensor, query: Tensor, key: Tensor, causal: bool, window: int | None) -> Tensor:
    """A padding mask `[B, filled]` without a layout, padding anywhere, as `[B, 1, S, L]`."""
    queries, keys, filled = query.shape[2], key.shape[2], mask.shape[1]
    place = torch.arange(keys, device=mask.device)
    at = torch.arange(filled - queries, filled, device=mask.device)[:, None]
    seen = torch.nn.functional.pad(mask.bool(), (0, keys - filled))[:, None, None].expand(-1, 1, queries, -1)
    if causal:
        seen = seen & (place <= at)
        if window is not None:
            seen = seen & (place > at - window)
    return seen


def _backend(query: Tensor, key: Tensor) -> tuple[str, str | None]:
    """The backend for these heads, and why it should not run after all."""
    backend, reason = choose_backend("auto", query.device, query.dtype, query.shape[-1])
    if backend == "reference" and query.device.type == "cuda":
        return backend, reason
    # Keys and values are read where they lie, with strides that TMA cannot follow.
    backend = "reference" if backend == "reference" else "triton"
    if backend == "triton" and key.shape[1] * max(key.stride(1), key.shape[2] * key.shape[3]) >= MAX_ROW_ELEMENTS:
        return backend, "the keys of a row have 2^31 elements or more"
    return backend, None


@functools.cache
def _log(reason: str) -> None:
    level = logging.INFO if reason in (ONE_LAUNCH, SMALL_ON_CPU) else logging.WARNING
    logger.log(level, "attn_implementation='fastattn' runs Transformers' own attention: %s", reason)
