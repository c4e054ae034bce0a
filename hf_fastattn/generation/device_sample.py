"""`device_sample`: `generate()`'s loop for models and calls that `DecodeLoop` can serve, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from hf_fastattn.autocast import autocast_as, forward_dtype
from hf_fastattn.graphs.module_checks import has_compiled
from hf_fastattn.patches.decoder.forward import why_not_paged
from hf_fastattn.patches.decoder.visible import visible_columns
from hf_fastattn.patches.fused.forward import fused_forward, fused_logits, fused_reason
from hf_fastattn.patches.modules.checkpointing import drops_cache
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.uncompiled import uncompiled


def device_sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any | None:
    """What `_sample` returns; None if Transformers' own loop has to run.

    Args:
        model: patched; `input_ids [B, S]` and all else are what `_sample` is given.
    """
    runtime = model._fastattn.runtime
    cache = model_kwargs.get(CACHE)
    private = not generation_config.return_dict_in_generate and runtime.is_private(cache)
    wishes = (input_ids, logits_processor, stopping_criteria, generation_config, streamer, private)
    request = _request(model, cache, model_kwargs.get("position_ids"), wishes)
    if isinstance(request, str):
        runtime.count_not_looped(request)
        return None
    assert cache is not None
    # Not before: it imports Triton.
    from hf_fastattn.loop.decode_loop import DecodeLoop

    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    positions = None
    if outputs.get(CACHE) is cache:
        positions = _first_positions(model, input_ids, outputs, dict(model_kwargs))
    logits = outputs.logits[:, -1]
    # Asked while the device computes the prompt, since it takes the host some milliseconds; a single token needs no step.
    reason = None if request.max_new == 1 else runtime.loop_graphs.why_not(model, cache)
    if not request.fits(logits.shape[-1]):
        reason = "a logits processor names a token that the head does not have"
    if positions is None or reason is not None:
        runtime.keep_prefilled(outputs)
        runtime.count_not_looped(reason or "a step over pages alone would not see what the mask shows")
        return None
    del outputs
    forward, logits_of = _parts_of_a_step(model, cache, request.max_new)
    runtime.looping = True
    try:
        loop = DecodeLoop(
            model, runtime.loop_graphs, runtime.counters, request, cache, input_ids, positions,
            vocabulary=logits.shape[-1], private=private, forward=forward, logits_of=logits_of,
            streamer=streamer, limits=runtime.row_limits,
        )  # fmt: skip
        tokens = loop.run(logits)
    finally:
        runtime.looping = False
    sequences = torch.cat((input_ids, tokens.to(input_ids.device)), 1)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache})


def _parts_of_a_step(model: Any, cache: Any, steps: int) -> tuple[Callable[..., Any], Callable[[Any, Tensor], Tensor]]:
    """The decoder's forward and that of `lm_head`, uncompiled, under the autocast that `model(...)` would enter."""
    dtype = forward_dtype(model)
    runtime, groups = model._fastattn.runtime, cache.groups
    copies = None
    # Layers that are called cast their weights themselves.
    if dtype is not None and runtime.config.autocast_copies and fused_reason(model._fastattn.decoder(model)) is None:
        to_come = len(cache.lengths) * -(-steps // groups.page_size) * groups.page_bytes
        copies = runtime.loop_graphs.copies_for(model, dtype, steps, to_come)

    compiled = has_compiled(model)

    def forward(decoder: Any, cache: Any, **arguments: Any) -> Any:
        with autocast_as(decoder.device, dtype), uncompiled() if compiled else nullcontext():
            return fused_forward(decoder, cache, copies, **arguments)

    def logits_of(lm_head: Any, hidden: Tensor) -> Tensor:
        with autocast_as(hidden.device, dtype), uncompiled() if compiled else nullcontext():
            return fused_logits(lm_head, hidden, copies)

    return forward, logits_of


def _axes_agree(positions: Any) -> bool:
    """Whether the tokens after `positions [axes, B, S]`, of which a first of four is for masks, have one for all axes."""
    if not isinstance(positions, Tensor) or positions.ndim < 3:
        return True
    last = positions[-3:, :, -1]
    return bool((last == last[:1]).all())


def _request(model: Any, cache: Any, positions: Any, wishes: tuple[Any, ...]) -> Any:
    """The `LoopRequest` of a call, or why the device's loop cannot serve it, before the prompt is computed.

    Args:
        positions: of the prompt, if they were given.
    """
    runtime = model._fastattn.runtime
    if runtime.looping:
        return "another call's loop is under way"
    reason = runtime.loop_graphs.why_not_here(model, cache)
    if reason is not None:
        return reason
    if wishes[0].device != model.device:
        return f"input_ids are on {wishes[0].device}, the model is on {model.device}: move them there"
    # Not before: it imports Triton.
    from hf_fastattn.loop.request import loop_request

    request = loop_request(model, *wishes)
    if isinstance(request, str):
        return request
    if not _axes_agree(positions):
        return "the prompt ends within an image, whose positions are not those of a text: let text follow it"
    # Its forwards count why they keep nothing.
    return "forwards drop the cache" if drops_cache(model._fastattn.decoder(model)) else request


def _first_positions(model: Any, input_ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]) -> Tensor | None:
    """Positions `[B, 1]` of the first new token; None if its forward would not be one over pages alone."""
    cache = outputs[CACHE]
    more = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    # Only the shape matters: any token will do.
    longer = torch.cat((input_ids, input_ids.new_zeros(input_ids.shape[0], 1)), 1)
    inputs = model.prepare_inputs_for_generation(longer, next_sequence_length=1, **more)
    mask = inputs.get("attention_mask")
    visible = visible_columns(mask, cache, input_ids.shape[0], 1)
    if why_not_paged(model._fastattn.decoder(model), mask, cache, visible, {}) is not None:
        return None
    positions = inputs.get("position_ids")
    if positions is None:
        return torch.full((input_ids.shape[0], 1), cache.get_seq_length(), device=input_ids.device)
    # Of several axes, which agree on text, the last one.
    positions = positions[-1] if positions.ndim == 3 else positions
    return positions.expand(input_ids.shape[0], 1) if positions.ndim == 2 and positions.shape[1] == 1 else None
