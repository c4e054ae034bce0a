"""One step of a beam search on static tensors: Transformers' arithmetic, in launches that a graph can hold.

Where Transformers' own methods have fixed shapes and take lengths from nowhere but the device, they are called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_fastattn.kernels.sampling.loop_tensors import FINISHED_BIT
from hf_fastattn.loop.beam_state import NEVER, BeamState, Length


def search_step(model: Any, state: BeamState, log_probs: Tensor, step: Tensor, length_penalty: float) -> Tensor:
    """Continue all beams by one token; returns the tokens `[N * M]`, and writes `parents` and `packed`.

    Args:
        model: whose `_beam_search` it is.
        log_probs: `[N * M, V]` fp32, after logits processors.
        step: `[1]` int32, new tokens so far.
        length_penalty: the call's; its powers are in the state.
    """
    step, shape = step.long(), state.shape
    top_scores, top_sequences, top_indices, tokens = _continuations(model, state, log_probs, step)
    hits = (tokens[..., None] == state.ends).any(-1) | (step + 1 >= state.last)
    running = model._get_running_beams_for_next_iteration(
        topk_log_probs=top_scores,
        topk_running_sequences=top_sequences,
        topk_running_beam_indices=top_indices,
        next_token_hits_stopping_criteria=hits,
        num_beams=shape.beams,
    )
    found = model._update_finished_beams(
        sequences=state.sequences,
        topk_running_sequences=top_sequences,
        beam_scores=state.scores,
        topk_log_probs=top_scores,
        beam_indices=state.indices,
        topk_running_beam_indices=top_indices,
        is_early_stop_heuristic_unsatisfied=state.may_improve,
        is_sent_finished=state.is_finished,
        next_token_hits_stopping_criteria=hits,
        top_num_beam_mask=state.is_first,
        num_beams=shape.beams,
        cur_len=Length(state, step),
        decoder_prompt_len=0,
        length_penalty=length_penalty,
        early_stopping=shape.early_stopping,
    )
    _write(state, running, found)
    _note_end(model, state, hits, step, length_penalty)
    column = (state.prompt + step).expand(*state.is_finished.shape, 1)
    state.parents.copy_(state.running_indices.gather(2, step.expand_as(column)).flatten())
    return state.running_sequences.gather(2, column).flatten()


def _continuations(model: Any, state: BeamState, log_probs: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `kept` best ones of each prompt: scores, sequences, indices and tokens, best first."""
    shape = state.shape
    # The best of all rows are among the best of each: a prompt's rows are too long a line for PyTorch's quick selection.
    each = min(shape.kept, log_probs.shape[-1])
    best, tokens = torch.topk(log_probs + state.running_scores.view(-1, 1), each)
    scores, places = torch.topk(best.view(shape.prompts, -1), shape.kept)
    beams = places // each
    tokens = tokens.view(shape.prompts, -1).gather(1, places)
    sequences = model._gather_beams(state.running_sequences, beams)
    indices = model._gather_beams(state.running_indices, beams)
    column = (state.prompt + step).expand(*tokens.shape, 1)
    sequences.scatter_(2, column, tokens[..., None])
    indices.scatter_(2, step.expand_as(column), (beams + state.first_rows)[..., None].int())
    return scores, sequences, indices, tokens


def _write(state: BeamState, running: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """Put what the step has found in place; results only while the search has not ended."""
    held = (state.running_sequences, state.running_scores, state.running_indices)
    for target, value in zip(held, running, strict=True):
        target.copy_(value)
    results = (state.sequences, state.scores, state.indices, state.is_finished)
    for target, value in zip(results, found, strict=True):
        target.copy_(torch.where(state.is_done, target, value))


def _note_end(model: Any, state: BeamState, hits: Tensor, step: Tensor, length_penalty: float) -> None:
    """Whether the search goes on, as `_check_early_stop_heuristic` and `_beam_search_has_unfinished_sequences` say."""
    length = Length(state, state.last if state.shape.looks_ahead else step + 1)
    best = state.running_scores[:, :1] / length**length_penalty
    # Transformers' `torch.where` with a number may copy it from the host.
    worst = state.scores.amin(1, keepdim=True).expand_as(state.scores).masked_fill(~state.is_finished, NEVER)
    state.may_improve.logical_and_((best > worst).any(-1, keepdim=True))
    goes_on = model._beam_search_has_unfinished_sequences(
        state.may_improve, state.is_finished, hits, state.shape.early_stopping
    )
    state.is_done.logical_or_(~goes_on)
    state.packed.copy_((state.is_done.long() << FINISHED_BIT).expand_as(state.packed))
