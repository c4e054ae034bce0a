"""`device_sample`: `generate()`'s loop for models and calls that `DecodeLoop` can serve, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from hf_fastattn.autocast import autocast_as, forward_dtype
from hf_fastattn.patches.decoder.forward import why_not_paged
from hf_fastattn.patches.decoder.visible import visible_columns
from hf_fastattn.patches.fused.forward import fused_forward, fused_logits, fused_reason
from hf_fastattn.patches.modules.checkpointing import drops_cache
from hf_fastattn.transformers_version import CACHE

if TYPE_CHECKING:
    from hf_fastattn.loop.request import LoopRequest


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

    def ask() -> Any:
        # Not before: it imports Triton.
        from hf_fastattn.loop.request import loop_request

        return loop_request(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, private)

    request = requested(model, cache, ask)
    started = None if request is None else start(model, input_ids, request, generation_config, model_kwargs)
    if started is None:
        return None
    assert request is not None and cache is not None
    from hf_fastattn.loop.decode_loop import DecodeLoop

    runtime.looping = True
    try:
        loop = DecodeLoop(
            model, runtime.loop_graphs, runtime.counters, request, cache, input_ids, started.positions, private=private,
            streamer=streamer, limits=runtime.row_limits, **started.parts,
        )  # fmt: skip
        tokens = loop.run(started.logits)
    finally:
        runtime.looping = False
    sequences = torch.cat((input_ids, tokens.to(input_ids.device)), 1)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache})


@dataclass(frozen=True)
class Start:
    """What a loop begins with.

    Attributes:
        logits: `[B, V]` after the prompt.
        positions: `[B, 1]` of the first new token.
        parts: further arguments of a `DecodeLoop`: the parts of a step, and the size of the logits.
    """

    logits: Tensor
    positions: Tensor
    parts: dict[str, Any]


def start(
    model: Any, input_ids: Tensor, request: LoopRequest, generation_config: Any, model_kwargs: dict[str, Any]
) -> Start | None:
    """Compute the prompt; None, and the reason is counted, if Transformers' own loop has to go on from there."""
    runtime, cache = model._fastattn.runtime, model_kwargs[CACHE]
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
    forward, logits_of = _parts_of_a_step(model, cache, request.max_new)
    return Start(logits, positions, {"vocabulary": logits.shape[-1], "forward": forward, "logits_of": logits_of})


def _parts_of_a_step(model: Any, cache: Any, steps: int) -> tuple[Callable[..., Any], Callable[[Any, Tensor], Tensor]]:
    """The decoder's forward and that of `lm_head`, under the autocast that `model(...)` would enter."""
    dtype = forward_dtype(model)
    runtime, groups = model._fastattn.runtime, cache.groups
    copies = None
    # Layers that are called cast their weights themselves.
    if dtype is not None and runtime.config.autocast_copies and fused_reason(model.base_model) is None:
        to_come = len(cache.lengths) * -(-steps // groups.page_size) * groups.page_bytes
        copies = runtime.loop_graphs.copies_for(model, dtype, steps, to_come)

    def forward(decoder: Any, cache: Any, **arguments: Any) -> Any:
        with autocast_as(decoder.device, dtype):
            return fused_forward(decoder, cache, copies, **arguments)

    def logits_of(lm_head: Any, hidden: Tensor) -> Tensor:
        with autocast_as(hidden.device, dtype):
            return fused_logits(lm_head, hidden, copies)

    return forward, logits_of


def requested(model: Any, cache: Any, ask: Callable[[], Any]) -> Any | None:
    """What a call asks for, before the prompt is computed; None, and the reason is counted, if no loop can serve it.

    Args:
        ask: the request, or why there is none.
    """
    runtime = model._fastattn.runtime
    reason = "another call's loop is under way" if runtime.looping else runtime.loop_graphs.why_not_here(model, cache)
    request = reason or ask()
    if not isinstance(request, str) and drops_cache(model.base_model):
        # Its forwards count why they keep nothing.
        request = "forwards drop the cache"
    if not isinstance(request, str):
        return request
    runtime.count_not_looped(request)
    return None


def _first_positions(model: Any, input_ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]) -> Tensor | None:
    """Positions `[B, 1]` of the first new token; None if its forward would not be one over pages alone."""
    cache = outputs[CACHE]
    more = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    # Only the shape matters: any token will do.
    longer = torch.cat((input_ids, input_ids.new_zeros(input_ids.shape[0], 1)), 1)
    inputs = model.prepare_inputs_for_generation(longer, next_sequence_length=1, **more)
    mask = inputs.get("attention_mask")
    visible = visible_columns(mask, cache, input_ids.shape[0], 1)
    if why_not_paged(model.base_model, mask, cache, visible, {}) is not None:
        return None
    positions = inputs.get("position_ids")
    if positions is None:
        return torch.full((input_ids.shape[0], 1), cache.get_seq_length(), device=input_ids.device)
    return positions.expand(input_ids.shape[0], 1) if positions.ndim == 2 and positions.shape[1] == 1 else None
