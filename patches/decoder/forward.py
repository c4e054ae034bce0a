"""The base decoder's forward of a patched model: padding dropped, the batch described once for all layers."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_fastattn.cache.hidden_tokens import can_hide, hide_tokens, show_again
from hf_fastattn.cache.padding import Padding
from hf_fastattn.cache.paged_cache import PagedCache
from hf_fastattn.graphs.module_checks import names_by_row, submodules
from hf_fastattn.graphs.seen_modules import Seen
from hf_fastattn.hints import with_hint
from hf_fastattn.loop.row_adapters import RowAdapters
from hf_fastattn.pages.model_layout import keys_dtype
from hf_fastattn.pages.page_storage import NarrowerKeysError
from hf_fastattn.parallel.gathered_weights import why_counted
from hf_fastattn.patches.decoder.chunked_prefill import pieces, run_pieces, streamed_pieces
from hf_fastattn.patches.decoder.visible import visible_columns
from hf_fastattn.patches.decoder.why_not_paged import GRADIENTS, HIDES_CACHED, why_not_paged, why_not_tokens
from hf_fastattn.patches.fused.forward import fused_forward, why_not_fused, why_not_these, why_not_walked
from hf_fastattn.patches.modules.checkpointing import cache_kept, drops_cache
from hf_fastattn.patches.modules.module_state import ModuleState, call_original, patched_forward
from hf_fastattn.patches.modules.plain_copies import STATE
from hf_fastattn.patches.modules.watched import why_watched
from hf_fastattn.transformers_version import CACHE


def decoder_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run the decoder over pages if the cache is ours and nothing asks for more; else as it was.

    Takes and returns what the original takes and returns. Hidden states of padding are zero on the paged path, but
    for models with linear-attention layers, where they are as arbitrary as in the original.

    Raises:
        ValueError: the cache belongs to another model, or the mask shows tokens that were padding when they were cached.
        CacheFullError: the memory limit is reached; the cache is as before the call.
    """
    arguments = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }
    return _forward(self, arguments, cache, {**kwargs, "use_cache": use_cache})


def decoder_forward_deepstack(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    visual_pos_masks: Tensor | None = None,
    deepstack_visual_embeds: list[Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """`decoder_forward` of Qwen3-VL, which adds features of the images to the states of the first layers.

    Args:
        visual_pos_masks: `[B, S]` bool, where image tokens stand.
        deepstack_visual_embeds: per layer `[image tokens, hidden]`, in the order of the mask.
    """
    arguments = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "visual_pos_masks": visual_pos_masks,
        "deepstack_visual_embeds": deepstack_visual_embeds,
    }
    return _forward(self, arguments, cache, {**kwargs, "use_cache": use_cache})


RECORDS = "a linear attention records its past"
DECODER_FORWARDS = (patched_forward(decoder_forward), patched_forward(decoder_forward_deepstack))


def _forward(self: Any, arguments: dict[str, Any], cache: Any, kwargs: dict[str, Any]) -> Any:
    state: ModuleState | None = vars(self).get(STATE)
    if state is None:
        return call_original(self, cache, **arguments, **kwargs)
    given, cache = cache, cache if cache is None else state.runtime.take_in(self, cache)
    if state.runtime.ranks is not None and state.runtime.in_call:
        with state.runtime.ranks.forward():
            return _forward_of(self, state, given, arguments, cache, kwargs)
    return _forward_of(self, state, given, arguments, cache, kwargs)


def _forward_of(
    self: Any, state: ModuleState, given: Any, arguments: dict[str, Any], cache: Any, kwargs: dict[str, Any]
) -> Any:
    """The forward with a cache that pages may stand in for; `given` is the caller's."""
    if cache is None and state.runtime.variants:
        return _forward_with_variants(self, arguments, kwargs)
    if not isinstance(cache, PagedCache):
        runtime = state.runtime
        # generate() has already counted why the call keeps Transformers' cache.
        if not torch.compiler.is_compiling() and not runtime.in_call and not runtime.is_aside:
            # Nothing to warn of: whoever trains or scores texts asked for no pages.
            state.runtime.count_fallback(_why_not_paged_cache(cache, kwargs), logging.INFO)
        return call_original(self, cache, **arguments, **kwargs)
    with cache_kept(self):
        outputs = _paged_forward(self, arguments, cache, kwargs)
    if given is not cache and isinstance(outputs, ModelOutput):
        outputs[CACHE] = given
    return outputs


def _forward_with_variants(self: Any, arguments: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """A forward without a cache of ours, of a model whose attention only pages compute: over pages of its own."""
    cache = PagedCache(self.config)
    keeps = self.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    outputs = _paged_forward(self, arguments, cache, {**kwargs, "use_cache": True})
    if keeps:
        return outputs
    cache.reset()
    if not isinstance(outputs, ModelOutput):
        return tuple(value for value in outputs if value is not cache)
    return type(outputs)(**{name: value for name, value in outputs.items() if value is not cache})


def _paged_forward(self: Any, arguments: dict[str, Any], cache: PagedCache, kwargs: dict[str, Any]) -> Any:
    state: ModuleState = vars(self)[STATE]
    if (arguments["input_ids"] is None) == (arguments["inputs_embeds"] is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if drops_cache(self):
        state.runtime.count_fallback("gradient checkpointing runs the layers without the cache")
        return call_original(self, cache, **arguments, **kwargs)
    if cache.may_adopt:
        cache.adopt(state.runtime.groups_for(self), self.config)
    if cache.stream != state.runtime.groups.stream:
        raise ValueError(
            f"{CACHE} was made with streaming={cache.groups.streaming}, but the model is patched with "
            f"streaming={state.runtime.config.streaming}; use PagedCache(model.config)"
        )
    if cache.hidden and (arguments["attention_mask"] is None or isinstance(arguments["attention_mask"], Tensor)):
        show_again(cache, arguments["attention_mask"])
    cache.take_written()
    if cache.dense is not None:
        cache.check_owner(self.config)
        if state.runtime.variants.rotates and not cache.dense.is_empty:
            state.runtime.variants.refuse(f"{CACHE} holds keys that were set, and RoPE is inside attention")
        reason = cache.into_pages(arguments["attention_mask"], keys_dtype(self))
        if reason is not None:
            state.runtime.count_fallback(reason)
            return call_original(self, cache, **arguments, **kwargs)
    whole = state.family.linear_attention or not state.runtime.variants.causal
    streams = cache.stream is not None
    call = state.runtime.current
    # Ranks that differ from each other compute as Transformers does.
    whole |= call is not None and call.why_apart is not None
    cut = streamed_pieces(arguments, cache, kwargs) if streams else None if whole else pieces(arguments, cache, kwargs)
    try:
        if cut is not None and streams and (counted := why_counted(self)) is not None:
            raise ValueError(f"a prompt that is longer than a stream keeps would take several forwards, but {counted}")
        if cut is not None and (streams or (why_watched(self) or why_counted(self)) is None):
            tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
            return run_pieces(cut, tokens.shape[1], cache, lambda piece: _cached_forward(self, piece, cache, kwargs))
        return _cached_forward(self, arguments, cache, kwargs)
    except NarrowerKeysError as narrower:
        # The model was cast since; Transformers' layers take on the wider dtype.
        cache.hold_dense()
        state.runtime.count_fallback(str(narrower))
        return call_original(self, cache, **arguments, **kwargs)


# The batch is described by Python numbers that change every step: tracing it would recompile every step.
@torch.compiler.disable
def _cached_forward(self: Any, arguments: dict[str, Any], cache: PagedCache, kwargs: dict[str, Any]) -> Any:
    if cache.groups.turn.is_mine():
        return _forward_within_memory(self, arguments, cache, kwargs)
    return (cache.take_turn(), _forward_within_memory(self, arguments, cache, kwargs))[1]


def _forward_within_memory(self: Any, arguments: dict[str, Any], cache: PagedCache, kwargs: dict[str, Any]) -> Any:
    """The forward; again, without a page ahead of need, where memory runs out and pages took more than they had to."""
    try:
        return _forward_in_turn(self, dict(arguments), cache, kwargs)
    except torch.OutOfMemoryError:
        # Other ranks wait for the sums of the first try.
        if vars(self)[STATE].runtime.ranks is not None or why_counted(self) is not None or not cache.save_memory():
            raise
    # Not while the error is handled, whose frames hold tensors.
    return _forward_in_turn(self, arguments, cache, kwargs)


def _forward_in_turn(self: Any, arguments: dict[str, Any], cache: PagedCache, kwargs: dict[str, Any]) -> Any:
    state: ModuleState = vars(self)[STATE]
    mask = arguments["attention_mask"]
    tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
    rows, columns = tokens.shape[:2]
    past = cache.get_seq_length()
    cache.check_owner(self.config)
    state.runtime.variants.reach(past + columns)
    if state.runtime.ranks is not None and not state.runtime.in_call:
        # generate() has done so.
        state.runtime.ranks.refresh_heads()
    visible = visible_columns(mask, cache, rows, columns)
    new = None if visible is None or bool(visible[:, past:].all()) else visible[:, past:]
    reason = why_not_paged(self, mask, cache, visible, kwargs)
    # Keys with RoPE inside belong to their places.
    moves = not state.runtime.variants.rotates
    if reason == HIDES_CACHED and visible is not None and moves and can_hide(cache, rows):
        hide_tokens(cache, visible[:, :past])
        reason = why_not_paged(self, mask, cache, visible, kwargs)
    adapters = None
    if reason is None and new is not None:
        call = state.runtime.current
        seen = None if call is None else call.seen
        # Who chooses adapters by row does so by hooks, for which no look vouches.
        adapters = None if seen and seen.is_sure else _adapters_by_row(self, new, {**arguments, **kwargs})
        reason = _why_padded(self, kwargs, adapters is not None, seen)
    if reason is None:
        reason = why_not_tokens(arguments, columns)
    if reason is None and tokens.requires_grad and torch.is_grad_enabled():
        reason = GRADIENTS
    if reason is not None:
        state.runtime.variants.refuse(with_hint(reason))
    # Pages keep no gradients for later forwards. A later mask, wide enough, may show tokens that this one does not reach:
    # pages would leave them out.
    is_short = visible is not None and mask.shape[1] < past + columns
    if reason == GRADIENTS or (reason is not None and is_short):
        cache.hold_dense()
        state.runtime.count_fallback(reason)
        return call_original(self, cache, **arguments, **kwargs)
    # Where its linear attention is called, a row's state must not meet another row's: the layout stays padded.
    why_called = None
    if reason is None and state.family.linear_attention:
        why_called = _why_called(self, {**arguments, **kwargs}, cache, new, visible, columns)
    keeps = why_called is not None
    try:
        called = keeps or reason is not None
        batch = cache.begin(rows, columns, new, dense=reason is not None, in_place=called)
        padding = None if new is None or reason is not None else Padding(new, tokens.device)
        outputs = None
        is_step = columns == 1 and new is None
        if reason is None and not is_step and not keeps:
            arguments = _packed_arguments(arguments, padding, past, rows, columns)
        if reason is None and (is_step or not keeps):
            outputs = _replayed(
                self, state, arguments, cache, kwargs, why_called or (RECORDS if cache.records_states else None)
            )
        if outputs is None:
            if keeps:
                # Padding stays, the attention layers skip it.
                cache.padding, padding = padding, None
                arguments = _padded_arguments(arguments, cache.padding, columns)
            elif reason is None and is_step:
                arguments = _packed_arguments(arguments, padding, past, rows, columns)
            forward = functools.partial(fused_forward, adapters=adapters, called=keeps) if reason is None else call_original
            outputs = forward(self, cache, **arguments, **kwargs)
        cache.commit()
    except BaseException:
        cache.rollback()
        raise
    if reason is None:
        cache.known_mask.remember(mask, past + columns)
    state.runtime.count_forward(reason, batch.tokens if past == 0 or state.runtime.prefilling else 0)
    return outputs if padding is None else padding.restore_outputs(outputs)


def _why_called(
    decoder: Any, arguments: dict[str, Any], cache: PagedCache, new: Tensor | None, visible: Tensor | None, columns: int
) -> str | None:
    """Why a forward of a model with linear-attention layers has to be one of padded rows, in its own layers; None if not."""
    # What pads before a row's first token change is nothing; behind it Transformers forgets for each of them.
    holes = new is not None and visible is not None and bool((visible[:, 1:] < visible[:, :-1]).any())
    if visible is not None and columns == 1:
        # No mask is made for a single column: there Transformers takes padding for a token.
        holes |= not bool(visible[:, -1].all())
    if holes:
        return "padding behind a row's first token passes through a linear attention"
    if cache.records_states and new is not None and len(set(new.sum(1).tolist())) > 1:
        return f"{RECORDS}, and rows get different numbers of tokens"
    call = vars(decoder)[STATE].runtime.current
    if call is not None and call.walks and not call.users_code and columns == 1:
        # To look at all layers at every step would take longer than many a step.
        return why_not_these(decoder, arguments)
    reason = why_not_walked(decoder, arguments)
    if call is not None:
        call.walks = reason is None
    return reason


def _replayed(
    self: Any,
    state: ModuleState,
    arguments: dict[str, Any],
    cache: PagedCache,
    kwargs: dict[str, Any],
    why_not: str | None,
) -> Any | None:
    """The output by way of `ForwardGraphs`; None if layers are launched one by one, or another thread has the turn."""
    turn = state.runtime.turn
    if turn.is_mine():
        graphs = state.runtime.graphs
        if graphs.is_spread:
            # What a call before may have written to is read again.
            state.runtime.rotary_copies.refresh()
        return graphs.run(
            self, arguments, cache, kwargs, fused_forward, state.runtime.counters, why_not,
            lambda: why_not_walked(self, arguments),
        )  # fmt: skip
    return (turn.take(0), _replayed(self, state, arguments, cache, kwargs, why_not) if turn.is_mine() else None)[1]


def _padded_arguments(arguments: dict[str, Any], padding: Padding | None, columns: int) -> dict[str, Any]:
    """Arguments for the original forward of a model with linear-attention layers: only these get a mask."""
    linear = None
    if padding is not None and columns > 1:
        mask = arguments["attention_mask"]
        linear = padding.visible.to(mask.device, mask.dtype)
    return {**arguments, "attention_mask": {"full_attention": None, "linear_attention": linear}}


def _packed_arguments(
    arguments: dict[str, Any], padding: Padding | None, past: int, rows: int, columns: int
) -> dict[str, Any]:
    """Arguments for the original forward: packed, and with a mask that nobody computes or reads."""
    tokens = arguments["input_ids"] if arguments["input_ids"] is not None else arguments["inputs_embeds"]
    position_ids = arguments["position_ids"]
    if position_ids is None:
        position_ids = torch.arange(past, past + columns, device=tokens.device)[None]
    if padding is not None:
        position_ids = padding.pack_positions(position_ids)
        for name in ("input_ids", "inputs_embeds"):
            if arguments[name] is not None:
                arguments[name] = padding.pack(arguments[name])
        if arguments.get("visual_pos_masks") is not None:
            arguments = _packed_visual(arguments, padding)
    # Transformers passes a 4-D mask on as it is; our attention ignores it.
    mask = torch.empty(1, 1, 1, 1, device=tokens.device)
    return {**arguments, "position_ids": position_ids, "attention_mask": mask}


def _packed_visual(arguments: dict[str, Any], padding: Padding) -> dict[str, Any]:
    """The same with the image tokens under the mask left out."""
    where = arguments["visual_pos_masks"]
    shown = padding.visible.to(where.device)[where]
    embeds = arguments["deepstack_visual_embeds"]
    return {
        **arguments,
        "visual_pos_masks": padding.pack(where),
        "deepstack_visual_embeds": embeds and [features[shown.to(features.device)] for features in embeds],
    }


def _why_not_paged_cache(cache: Any, kwargs: dict[str, Any]) -> str:
    """What a forward has instead of pages, as a reason to count."""
    if cache is not None:
        return f"{CACHE} is a {type(cache).__name__}"
    return "use_cache=False" if kwargs.get("use_cache") is False else "a forward without a PagedCache"


def _adapters_by_row(decoder: Any, visible: Tensor, arguments: dict[str, Any]) -> Any:
    """The adapters of the tokens of a padded batch, if PEFT was asked for one a row, and fused layers can add them."""
    rows = next((rows for rows in map(names_by_row, submodules(decoder)) if rows is not None), None)
    if rows is None or why_not_fused(decoder, arguments) is not None:
        return None
    # Not before: it imports Triton.
    from hf_fastattn.patches.fused.row_adapters import of_tokens, why_not_by_row

    if len(rows) != len(visible) or why_not_by_row(decoder, rows) is not None:
        return None
    return of_tokens(RowAdapters.of(rows), visible, decoder.device)


def _why_padded(decoder: Any, kwargs: dict[str, Any], by_row: bool, seen: Seen | None) -> str | None:
    """Why the padding of a batch must stay; None if it may be taken out."""
    for name, value in kwargs.items():
        if isinstance(value, Tensor | list | tuple):
            return f"padding stays, since {name} may belong to rows or columns"
    watched = why_watched(decoder, by_row, seen)
    return None if watched is None else f"padding stays: {watched}"
