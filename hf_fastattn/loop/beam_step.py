"""One step of a beam search on static tensors: Transformers' arithmetic, in launches that a graph can hold.

Where Transformers' own methods have fixed shapes and take lengths from nowhere but the device, they are called. Scores that
no logits processor sees need not be there for all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationMixin

from hf_fastattn.kernels.sampling.continuations import MOST_KEPT, continuations
from hf_fastattn.kernels.sampling.continuations_reference import best_of_parts
from hf_fastattn.kernels.sampling.loop_tensors import FINISHED_BIT
from hf_fastattn.loop.beam_state import NEVER, BeamState, Length
from hf_fastattn.loop.device_state import DeviceState
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.token_choice import processed


class _Methods(GenerationMixin):
    """Transformers' methods of beam search; they gather by indices that are known to be in range."""

    @staticmethod
    def _gather_beams(tensor: Tensor, beam_indices: Tensor) -> Tensor:
        index = beam_indices if tensor.ndim == 2 else beam_indices[..., None].expand(-1, -1, tensor.shape[2])
        return tensor.gather(1, index)


METHODS = _Methods()


def candidates(state: DeviceState, key: GraphKey, beams: BeamState, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and tokens `[N * M, C]` among which are those of the `kept` best continuations of every row.

    Args:
        state: of the loop, with its processors.
        key: which of them are used.
        beams: of the search.
        logits: `[N * M, V]`.
    """
    so_far, kept = beams.running_scores.view(-1), min(beams.shape.kept, logits.shape[1])
    if key.processors or key.penalised or key.suppressed:
        # As in Transformers, processors get logarithms of probabilities.
        return best_of_parts(processed(state, key, logits.float().log_softmax(-1)), so_far, kept)
    if kept > MOST_KEPT:
        return best_of_parts(logits.float().log_softmax(-1), so_far, kept)
    return continuations(logits, so_far, kept)


def search_step(state: BeamState, best: tuple[Tensor, Tensor], step: Tensor, length_penalty: float) -> Tensor:
    """Continue all beams by one token; returns the tokens `[N * M]`, and writes `parents` and `packed`.

    Args:
        best: of `candidates`.
        step: `[1]` int32, new tokens so far.
        length_penalty: the call's; its powers are in the state.
    """
    step, shape = step.long(), state.shape
    column, after = state.prompt + step, step + 1
    top_scores, top_sequences, top_indices, tokens = _chosen(state, best, step, column)
    hits = (tokens[..., None] == state.ends).any(-1) | (after >= state.last)
    running = METHODS._get_running_beams_for_next_iteration(
        topk_log_probs=top_scores,
        topk_running_sequences=top_sequences,
        topk_running_beam_indices=top_indices,
        next_token_hits_stopping_criteria=hits,
        num_beams=shape.beams,
    )
    found = METHODS._update_finished_beams(
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
    _note_end(state, hits, after, length_penalty)
    state.parents.copy_(state.running_indices.index_select(2, step).flatten())
    return state.running_sequences.index_select(2, column).flatten()


def _chosen(
    state: BeamState, best: tuple[Tensor, Tensor], step: Tensor, column: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `kept` best continuations of each prompt: scores, sequences, indices and tokens, best first."""
    shape, (scores, tokens) = state.shape, best
    each = scores.shape[1]
    scores, places = torch.topk(scores.view(shape.prompts, -1), shape.kept)
    beams, tokens = places // each, tokens.view(shape.prompts, -1).gather(1, places)
    sequences = METHODS._gather_beams(state.running_sequences, beams)
    indices = METHODS._gather_beams(state.running_indices, beams)
    sequences.index_copy_(2, column, tokens[..., None])
    indices.index_copy_(2, step, (beams + state.first_rows)[..., None].int())
    return scores, sequences, indices, tokens


def _write(state: BeamState, running: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """Put what the step has found in place; results only while the search has not ended."""
    held = (state.running_sequences, state.running_scores, state.running_indices)
    for target, value in zip(held, running, strict=True):
        target.copy_(value)
    results = (state.sequences, state.scores, state.indices, state.is_finished)
    for target, value in zip(results, found, strict=True):
        torch.where(state.is_done[:1], target, value, out=target)


def _note_end(state: BeamState, hits: Tensor, after: Tensor, length_penalty: float) -> None:
    """Whether the search goes on, as `_check_early_stop_heuristic` and `_beam_search_has_unfinished_sequences` say.

    Args:
        hits: `[N, K]` bool, which continuations have ended.
        after: `[1]` int64, new tokens with that of this step.
    """
    length = Length(state, state.last if state.shape.looks_ahead else after)
    best = state.running_scores[:, :1] / length**length_penalty
    # Transformers' `torch.where` with a number may copy it from the host.
    worst = state.scores.amin(1, keepdim=True).expand_as(state.scores).masked_fill(~state.is_finished, NEVER)
    state.may_improve.logical_and_((best > worst).any(-1, keepdim=True))
    goes_on = METHODS._beam_search_has_unfinished_sequences(
        state.may_improve, state.is_finished, hits, state.shape.early_stopping
    )
    state.is_done.logical_or_(~goes_on)
    torch.mul(state.is_done, 1 << FINISHED_BIT, out=state.packed)
