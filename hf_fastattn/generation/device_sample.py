"""`device_sample`: `generate()`'s loop for models and calls that `DecodeLoop` can serve, with the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from hf_fastattn.autocast import autocast_as, forward_dtype
from hf_fastattn.generation.agreed_request import agreed_request
from hf_fastattn.generation.prefix_call import keep_row, kept_prompt
from hf_fastattn.generation.users_code import ModelWatch, may_be_users
from hf_fastattn.graphs.drawn_offset import settled_offset
from hf_fastattn.graphs.placement import SEVERAL
from hf_fastattn.graphs.weight_copies import copies_fit
from hf_fastattn.loop.row_adapters import RowAdapters
from hf_fastattn.patches.decoder.forward import RECORDS
from hf_fastattn.patches.decoder.visible import visible_columns
from hf_fastattn.patches.decoder.why_not_paged import why_not_paged
from hf_fastattn.patches.fused.forward import calls_layers, fused_forward, fused_logits, fused_reason, why_not_walked
from hf_fastattn.patches.modules.checkpointing import drops_cache
from hf_fastattn.transformers_version import CACHE
from hf_fastattn.uncompiled import uncompiled

if TYPE_CHECKING:
    from hf_fastattn.loop.request import LoopRequest


CHANGED = "a streamer has changed the model"
ENDS_APART = "a streamer that is not Transformers' may change the model when some rows have ended"


@dataclass(frozen=True)
class GoesOn:
    """Where Transformers' own loop goes on, behind tokens that the device's has chosen.

    Attributes:
        input_ids: `[B, S + new]`, of which the last token's forward is kept as the prompt's outputs.
        model_kwargs: as they are before that forward.
    """

    input_ids: Tensor
    model_kwargs: dict[str, Any]


def device_sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> Any | None:
    """What `_sample` returns; None, or from where on, if Transformers' own loop has to run.

    Args:
        model: patched; `input_ids [B, S]` and all else are what `_sample` is given.
    """
    runtime = model._fastattn.runtime
    cache = model_kwargs.get(CACHE)
    users = streamer is not None and may_be_users(streamer)
    private = not generation_config.return_dict_in_generate and runtime.is_private(cache)

    def ask() -> Any:
        # Not before: it imports Triton.
        from hf_fastattn.loop.request import loop_request

        given = (logits_processor, stopping_criteria, generation_config, streamer, private)
        request = loop_request(model, input_ids, *given)
        if isinstance(request, str) or not users or len(input_ids) == 1:
            return request
        return ENDS_APART if request.ends or request.stop_strings else request

    # What a user's streamer changes between two tokens, and changes back, nobody sees: then only the prompt stays.
    request = requested(model, input_ids, cache, model_kwargs.get("position_ids"), ask, private, keeps=not users)
    if request is None:
        return None
    private, keeps = private and runtime.current.is_private, not users and runtime.current.keeps_rows
    with _rehearsing(model, request, cache, input_ids):
        started = start(model, input_ids, request, generation_config, model_kwargs, spread=True)
    if started is None:
        return None
    assert cache is not None
    from hf_fastattn.loop.decode_loop import DecodeLoop

    kept = kept_prompt(model, cache)
    keep = functools.partial(keep_row, kept) if kept and keeps else None
    # Streams without end are not Transformers' attention in any case.
    watch = ModelWatch(model) if users and cache.stream is None else None
    runtime.looping = True
    try:
        loop = DecodeLoop(
            model, runtime.loop_graphs, runtime.counters, request, cache, input_ids, started.positions, private=private,
            streamer=streamer, limits=runtime.row_limits, keep=keep,
            has_changed=None if watch is None else watch.has_changed, **started.parts,
        )  # fmt: skip
        with settled_offset(model.device, lambda: loop.steps):
            tokens = loop.run(started.logits)
    finally:
        runtime.looping = False
    runtime.current.looped = True
    sequences = torch.cat((input_ids, tokens.to(input_ids.device)), 1)
    if loop.is_cut_short:
        return _go_on(model, sequences, started.outputs, model_kwargs, tokens.shape[1])
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE: cache})


def _go_on(model: Any, sequences: Tensor, outputs: Any, model_kwargs: dict[str, Any], new: int) -> GoesOn:
    """Compute the last token with the model as it is now, for Transformers' loop to choose the next one.

    Args:
        outputs: of the prompt, `new` tokens before.
    """
    runtime = model._fastattn.runtime
    runtime.count_not_looped(CHANGED)
    more = model._update_model_kwargs_for_generation(outputs, dict(model_kwargs), num_new_tokens=new)
    inputs = model.prepare_inputs_for_generation(sequences, next_sequence_length=1, **more)
    runtime.keep_prefilled(model(**inputs, return_dict=True))
    return GoesOn(sequences, more)


@contextmanager
def _rehearsing(model: Any, request: LoopRequest, cache: Any, input_ids: Tensor) -> Iterator[None]:
    """A rehearsal of the prompt inside has the kernels of the choice compiled with its own, not after them."""
    call = model._fastattn.runtime.current

    def choice() -> None:
        # Not before: it imports Triton.
        from hf_fastattn.loop.rehearsed_choice import rehearse_choice

        rehearse_choice(model, request, cache, input_ids.shape[0], fused_logits)

    if call is not None:
        call.rehearses_too = choice
    try:
        yield
    finally:
        if call is not None:
            call.rehearses_too = None


@dataclass(frozen=True)
class Start:
    """What a loop begins with.

    Attributes:
        logits: `[B, V]` after the prompt.
        positions: `[B, 1]` of the first new token.
        outputs: of the prompt.
        parts: further arguments of a `DecodeLoop`: the parts of a step, and the size of the logits.
    """

    logits: Tensor
    positions: Tensor
    outputs: Any
    parts: dict[str, Any]


def start(
    model: Any,
    input_ids: Tensor,
    request: LoopRequest,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    spread: bool = False,
) -> Start | None:
    """Compute the prompt; None, and the reason is counted, if Transformers' own loop has to go on from there.

    `spread`: the loop may have layers on several devices.
    """
    runtime, cache = model._fastattn.runtime, model_kwargs[CACHE]
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    positions = None
    if outputs.get(CACHE) is cache:
        positions = _first_positions(model, input_ids, outputs, dict(model_kwargs))
    logits = outputs.logits[:, -1]
    # Asked while the device computes the prompt, since it takes the host some milliseconds; a single token needs no step.
    reason = None if request.max_new == 1 else runtime.loop_graphs.why_not(model, cache, by_row=True, spread=spread)
    if reason is None and (cache.recurrent_layers or runtime.loop_graphs.is_spread):
        # Transformers' own layers would look for their states in the cache.
        reason = why_not_walked(model._fastattn.decoder(model), {"input_ids": input_ids})
        if cache.records_states:
            reason = RECORDS
    if reason is None and cache.stream is not None and runtime.loop_graphs.is_spread and request.max_new > 1:
        reason = "rows forget tokens, and the model is on several devices"
    rows = runtime.loop_graphs.adapter_names if request.max_new > 1 else None
    if rows is not None and reason is None:
        reason = SEVERAL if runtime.loop_graphs.is_spread else _why_not_by_row(model, rows, input_ids.shape[0])
    if not request.fits(logits.shape[-1]):
        reason = "a logits processor names a token that the head does not have"
    if positions is None or reason is not None:
        runtime.keep_prefilled(outputs)
        runtime.count_not_looped(reason or "a step needs more than its token, its position and what the pages hold")
        return None
    adapters = None if rows is None else RowAdapters.of(rows)
    forward, logits_of = _parts_of_a_step(model, cache, request.max_new, None if adapters is None else adapters.names)
    parts = {"vocabulary": logits.shape[-1], "forward": forward, "logits_of": logits_of, "adapters": adapters}
    return Start(logits, positions, outputs, parts)


def _why_not_by_row(model: Any, rows: tuple[str, ...], count: int) -> str | None:
    # Not before: it imports Triton.
    from hf_fastattn.patches.fused.row_adapters import why_not_by_row

    if len(rows) != count:
        return f"{len(rows)} adapter_names for {count} rows"
    if forward_dtype(model) not in (None, torch.bfloat16, torch.float16):
        return f"adapters are chosen by row, and autocast is to {forward_dtype(model)}"
    return why_not_by_row(model._fastattn.decoder(model), rows, model.lm_head)


def _parts_of_a_step(
    model: Any, cache: Any, steps: int, names: tuple[str, ...] | None
) -> tuple[Callable[..., Any], Callable[[Any, Tensor], Tensor]]:
    """The decoder's forward and that of `lm_head`, uncompiled, under the autocast that `model(...)` would enter.

    `names` are those of adapters that rows choose from, if they do.
    """
    dtype = forward_dtype(model)
    graphs, copies, stacks = model._fastattn.runtime.loop_graphs, None, None
    # Layers that are called cast their weights, and add their adapters, themselves; copies and stacks are on one device.
    if graphs.is_spread:
        # What a call before may have written to is read again.
        model._fastattn.runtime.rotary_copies.refresh()
    elif fused_reason(model._fastattn.decoder(model)) is None:
        to_come = len(cache.lengths) * -(-steps // cache.groups.page_size) * cache.groups.page_bytes
        copies = _copies(model, dtype, steps, to_come, names)
        stacks = _stacks(model, to_come, names)

    def adapters(rows: int) -> Any:
        if names is None and stacks is None:
            return None
        from hf_fastattn.patches.fused.adapter_stacks import TokenAdapters

        assert graphs.state is not None
        return TokenAdapters(graphs.state.adapters[:rows], names, stacks)

    compiled, called = model._runs_uncompiled(cache), calls_layers(model._fastattn.decoder(model))

    def forward(decoder: Any, cache: Any, **arguments: Any) -> Any:
        with autocast_as(decoder.device, dtype), uncompiled() if compiled else nullcontext():
            rows = arguments["position_ids"].shape[0]
            return fused_forward(decoder, cache, copies, adapters(rows), **arguments)

    def logits_of(lm_head: Any, hidden: Tensor) -> Tensor:
        with autocast_as(hidden.device, dtype), uncompiled() if compiled else nullcontext():
            return lm_head(hidden) if called else fused_logits(lm_head, hidden, copies, adapters(hidden.shape[0]))

    return forward, logits_of


def _copies(model: Any, dtype: Any, steps: int, to_come: int, names: tuple[str, ...] | None) -> Any:
    """16-bit copies of the weights that the steps of a call under autocast read; None where there are none."""
    runtime = model._fastattn.runtime
    if dtype is None or not runtime.config.autocast_copies:
        return None
    from hf_fastattn.patches.fused.weights_read import weights_read

    weights = functools.partial(weights_read, model, dtype, names)
    return runtime.loop_graphs.copies_for(model.device, weights, dtype, steps, to_come)


def _stacks(model: Any, to_come: int, names: tuple[str, ...] | None) -> Any:
    """The adapters of layers that have several, stacked; None where no layer has."""
    from hf_fastattn.patches.fused.adapter_stacks import AdapterStacks

    def make() -> Any:
        wanted = AdapterStacks.are_wanted(model, names)
        fit = wanted and copies_fit(model.device, AdapterStacks.bytes_needed(model, names), to_come)
        return AdapterStacks(model, names) if fit else None

    return model._fastattn.runtime.loop_graphs.stacks_for(names, make)


def _axes_agree(positions: Any) -> bool:
    """Whether the tokens after `positions [axes, B, S]`, of which a first of four is for masks, have one for all axes."""
    if not isinstance(positions, Tensor) or positions.ndim < 3:
        return True
    last = positions[-3:, :, -1]
    return bool((last == last[:1]).all())


def requested(
    model: Any,
    input_ids: Tensor,
    cache: Any,
    positions: Any,
    ask: Callable[[], Any],
    private: bool = True,
    keeps: bool = True,
) -> Any | None:
    """What a call asks for, before the prompt is computed; None, and the reason is counted, if no loop can serve it.

    Args:
        positions: of the prompt, if they were given.
        ask: the request, or why there is none.
        private: see `agreed_request`, and `keeps`.
    """
    runtime = model._fastattn.runtime
    reason = _why_no_loop(model, input_ids, cache)
    request = reason or ask()
    if not isinstance(request, str) and not _axes_agree(positions):
        request = "the prompt ends within an image, whose positions are not those of a text: let text follow it"
    if not isinstance(request, str) and drops_cache(model._fastattn.decoder(model)):
        # Its forwards count why they keep nothing.
        request = "forwards drop the cache"
    if runtime.ranks is not None:
        request = agreed_request(model, request, input_ids, private, keeps)
    if not isinstance(request, str):
        return request
    runtime.count_not_looped(request)
    return None


def _why_no_loop(model: Any, input_ids: Tensor, cache: Any) -> str | None:
    runtime = model._fastattn.runtime
    if runtime.looping:
        return "another call's loop is under way"
    reason: str | None = runtime.loop_graphs.why_not_here(model, cache)
    if reason is None and input_ids.device != model.device:
        return f"input_ids are on {input_ids.device}, the model is on {model.device}: move them there"
    return reason


def _first_positions(model: Any, input_ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]) -> Tensor | None:
    """Positions `[B, 1]` of the first new token; None if its forward would not be one over pages alone."""
    cache = outputs[CACHE]
    more = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    # Only the shape matters: any token will do.
    longer = torch.cat((input_ids, input_ids.new_zeros(input_ids.shape[0], 1)), 1)
    inputs = model.prepare_inputs_for_generation(longer, next_sequence_length=1, **more)
    tokens = inputs.get("input_ids")
    if inputs.get("inputs_embeds") is not None or tokens is None or tokens.shape != (input_ids.shape[0], 1):
        # PEFT may put its virtual tokens before every new one.
        return None
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
