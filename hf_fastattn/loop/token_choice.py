"""How a step of the decode loop chooses tokens from its logits: on the device, by parameters in device memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_fastattn.kernels.sampling.draw import choose_tokens
from hf_fastattn.kernels.sampling.logprobs import token_logprobs
from hf_fastattn.kernels.sampling.penalty import process_logits
from hf_fastattn.kernels.sampling.processors import kept_scores
from hf_fastattn.loop.device_state import DeviceState
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.step_processor import FIRST, LAST, MIDDLE


def choose(state: DeviceState, key: GraphKey, logits: Tensor) -> None:
    """Write the next token of every row to `chosen`, and to `state.logprobs` how likely it was if the key says so.

    Args:
        state: parameters, seed, step and row numbers; tokens seen so far.
        key: which of them are used.
        logits: `[rows, V]`; may be changed.
    """
    tensors = state.tensors(key.rows, key.penalised)
    logits = processed(state, key, logits)
    draw = {"seed": state.seed, "rows": state.numbers[: key.rows], "step": tensors.step}
    params = state.own_params[: key.rows] if key.own_params else state.params
    if any(kind.place == LAST for kind, _ in key.processors):
        # What a draw would keep, and then the processors that come after temperature, top-k, top-p and min-p.
        thresholds = state.thresholds[: key.rows]
        choose_tokens(logits, tensors.chosen, params=params, thresholds=thresholds, **draw)
        logits = kept_scores(logits, params[:1], thresholds)
        logits = state.processors.apply(key.processors, LAST, logits, tensors.step)
        params = state.no_filters
    if not key.do_sample:
        choose_tokens(logits, tensors.chosen)
        if key.forced:
            _force(state, key, logits)
        if key.logprobs:
            token_logprobs(logits, tensors.chosen, state.logprobs[: key.rows])
        return
    least = state.thresholds[: key.rows] if key.logprobs else None
    choose_tokens(logits, tensors.chosen, params=params, thresholds=least, **draw)
    if key.logprobs:
        token_logprobs(logits, tensors.chosen, state.logprobs[: key.rows], params=params, thresholds=least)


def _force(state: DeviceState, key: GraphKey, logits: Tensor) -> None:
    """Note what the step would have taken, and how likely the forced tokens were; rows take these."""
    tensors, held = state.tensors(key.rows, key.penalised), state.forced
    places = held.places(tensors, state.numbers[: key.rows])
    forced, likely = held.tokens[places], state.logprobs[: key.rows]
    token_logprobs(logits, forced, likely)
    held.choices.index_put_(places, tensors.chosen)
    held.logprobs.index_put_(places, likely)
    tensors.chosen.copy_(forced)


def processed(state: DeviceState, key: GraphKey, logits: Tensor) -> Tensor:
    """`logits [rows, V]`, which may be changed, after all processors but those that come last."""
    tensors = state.tensors(len(logits), key.penalised)
    logits = state.processors.apply(key.processors, FIRST, logits, tensors.step)
    if key.penalised or key.suppressed:
        ends = {"eos": state.suppressed, "step": tensors.step} if key.suppressed else {}
        logits = process_logits(logits, state.params, seen=tensors.seen, **ends)
    return state.processors.apply(key.processors, MIDDLE, logits, tensors.step)


def choose_first(
    state: DeviceState, logits: Tensor, numbers: Tensor, params: Tensor | None, logprobs: Tensor | None
) -> Tensor:
    """The tokens `[n]` that follow prompts with these `logits [n, V]`, whose rows take no part in steps yet.

    Args:
        numbers: `[n]` int32, which random numbers each row draws with; others than in steps.
        params: `[PARAMS]` or `[n, PARAMS]` of the draw; None for the likeliest tokens.
        logprobs: `[n]` fp32, gets how likely they were.
    """
    chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    thresholds = None
    if params is None:
        choose_tokens(logits, chosen)
    else:
        thresholds = None if logprobs is None else torch.empty_like(logprobs)
        step = state.tensors(1, False).step
        choose_tokens(logits, chosen, params=params, seed=state.seed, rows=numbers, step=step, thresholds=thresholds)
    if logprobs is not None:
        token_logprobs(logits, chosen, logprobs, params=params, thresholds=thresholds)
    return chosen
