"""`device_beams`: beam search by `BeamLoop`, for models and calls that it can serve, with the same result."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_fastattn.generation.device_sample import requested, start
from hf_fastattn.graphs.drawn_offset import settled_offset
from hf_fastattn.transformers_version import CACHE


def device_beams(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Any | None:
    """What `_beam_search` returns; None if Transformers' own loop has to run.

    Args:
        model: patched; `input_ids [N * M, S]` and all else are what `_beam_search` is given.
    """
    runtime = model._fastattn.runtime
    cache = model_kwargs.get(CACHE)

    def ask() -> Any:
        # Not before: it imports Triton.
        from hf_fastattn.loop.beam_request import beam_request

        return beam_request(
            model, input_ids, logits_processor, stopping_criteria, generation_config, runtime.is_private(cache)
        )

    request = requested(model, input_ids, cache, model_kwargs.get("position_ids"), ask)
    started = None if request is None else start(model, input_ids, request.loop, generation_config, model_kwargs)
    if started is None:
        return None
    assert request is not None and cache is not None
    from hf_fastattn.loop.beam_loop import BeamLoop

    runtime.looping = True
    try:
        loop = BeamLoop(
            model, runtime.loop_graphs, runtime.counters, request, cache, input_ids, started.positions, **started.parts
        )
        with settled_offset(model.device, lambda: loop.steps):
            sequences = loop.sequences(started.logits)
        runtime.current.looped = True
        return sequences
    finally:
        runtime.looping = False
