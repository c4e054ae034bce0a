"""The kernels that a forward of a new size needs, compiled side by side before its layers run.

One layer of each kind is walked without launching anything: what it would launch is compiled by several threads meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hf_fastattn.autocast import region_dtype
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.drawn_offset import unmoved_offset
from hf_fastattn.graphs.module_checks import submodules, why_not_module
from hf_fastattn.kernels.launch import power_of_2
from hf_fastattn.patches.modules.plain_modules import layers_of

logger = logging.getLogger("hf_fastattn")


def rehearse(
    decoder: Any, cache: PagedCache, rehearsed: set[Any], device: torch.device, walk: Callable[[Iterable[Any]], Any]
) -> None:
    """Have the kernels compiled that `walk` launches, if it is the first forward of about this size.

    Args:
        cache: with a paged batch under way.
        rehearsed: the sizes so far.
        device: of the tokens.
        walk: runs layers on the forward's input, and changes nothing that the forward reads but by launches.
    """
    batch = cache.paged_batch
    assert batch is not None
    size = (batch.is_decode, power_of_2(batch.tokens), power_of_2(batch.rows), device, region_dtype(device))
    if size in rehearsed:
        return
    rehearsed.add(size)
    # Not before: it imports Triton.
    from hf_fastattn.kernels.rehearsal import can_rehearse, rehearsal

    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    # A linear attention leaves its states in the cache.
    if capturing or cache.recurrent_layers or not can_rehearse():
        return
    layers = one_of_each_kind(decoder, cache)
    if any(why_not_module(module, device) for layer in layers for module in submodules(layer)):
        # Somebody else's code is called once.
        return
    try:
        with unmoved_offset(device), rehearsal():
            walk(layers)
    except Exception as error:
        # The forward itself fails then, or it does not.
        logger.info("hf_fastattn could not compile ahead: %s: %s", type(error).__name__, error)
    finally:
        # What one layer makes for the others was not made.
        batch.forget_tables()


def one_of_each_kind(decoder: Any, cache: PagedCache) -> list[Any]:
    """The first layer of every kind, by the classes of its modules and its window."""
    found: dict[Any, Any] = {}
    for index, layer in enumerate(layers_of(decoder)):
        found.setdefault((cache.layers[index].window, *map(type, submodules(layer))), layer)
    return list(found.values())
