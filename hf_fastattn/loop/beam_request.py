"""`BeamRequest`: what a beam search asks of the decode loop beside its `LoopRequest`, read from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from hf_fastattn.kernels.sampling.fork import MOST_BEAMS
from hf_fastattn.loop.known_processors import WARPERS
from hf_fastattn.loop.request import LoopRequest, loop_request

# What Transformers calculates with in a beam search; a model with its own may do something else.
METHODS = (
    "_beam_search", "_gather_beams", "_get_running_beams_for_next_iteration", "_update_finished_beams",
    "_check_early_stop_heuristic", "_beam_search_has_unfinished_sequences", "_get_top_k_continuations",
)  # fmt: skip


@dataclass(frozen=True)
class BeamRequest:
    """How beams are kept and which are returned.

    Attributes:
        loop: length, end tokens and processors.
        beams: of each prompt.
        kept: continuations of each prompt that are looked at: enough to go on with if all the best ones end.
        returned: sequences of each prompt that the call returns; None for all.
        fill: what follows the end of a sequence.
        powers: `n ** length_penalty` for n = 0 .. the greatest number of new tokens.
        length_penalty: the exponent.
        early_stopping: True, False or "never".
    """

    loop: LoopRequest
    beams: int
    kept: int
    returned: int | None
    fill: int
    powers: tuple[float, ...]
    length_penalty: float
    early_stopping: bool | str

    @property
    def looks_ahead(self) -> bool:
        """Whether a beam's best score is taken to be that of its greatest length."""
        return self.early_stopping == "never" and self.length_penalty > 0.0


def beam_request(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    rows_are_private: bool,
) -> BeamRequest | str:
    """The request of a beam search, or why `BeamLoop` cannot serve it.

    Args:
        rows_are_private: nobody sees the cache after the call.
    """
    config = generation_config
    reason = _why_not(config, model._fastattn_base, logits_processor, rows_are_private)
    if reason is not None:
        return reason
    request = loop_request(model, input_ids, logits_processor, stopping_criteria, config, None, rows_are_private)
    if isinstance(request, str):
        return request
    if request.stop_strings is not None:
        return "beams that end with a stop string"
    if request.forced is not None:
        return "tokens are forced: give num_beams=1"
    if config.max_length != input_ids.shape[1] + request.max_new or input_ids.shape[0] % config.num_beams:
        return f"{config.num_beams} beams of {input_ids.shape[0]} rows, max_length={config.max_length}"
    powers = _powers(config.length_penalty, request.max_new)
    if powers is None:
        return f"length_penalty={config.length_penalty} is too large for {request.max_new} new tokens"
    eos, pad = config._eos_token_tensor, config._pad_token_tensor
    ends = [] if eos is None else eos.flatten().tolist()
    # As Transformers has it: a padding token of 0 is none.
    fill = (int(pad) if pad is not None else 0) or ends[0] if ends else -1
    return BeamRequest(
        loop=request,
        beams=config.num_beams,
        kept=max(2, 1 + len(ends)) * config.num_beams,
        returned=config.num_return_sequences,
        fill=fill,
        powers=powers,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,
    )


def without_ends(request: LoopRequest) -> LoopRequest:
    """The same for rows that go on until all have finished."""
    return replace(request, ends=())


def _why_not(config: Any, base: Any, logits_processor: Sequence[Any], private: bool) -> str | None:
    if config.do_sample:
        return "beams are drawn: do_sample=False lets the device search"
    if config.return_dict_in_generate or not private:
        return "beams whose cache is seen after the call: leave out return_dict_in_generate and past_key_values"
    theirs = GenerationMixin.__module__
    own = [name for name in METHODS if getattr(getattr(base, name, None), "__module__", None) != theirs]
    if own or hasattr(base, "_reorder_cache"):
        return f"{base.__name__}.{(own or ['_reorder_cache'])[0]} is its own"
    warpers = [type(one).__name__ for one in logits_processor if isinstance(one, WARPERS)]
    if warpers:
        return f"beams with a {warpers[0]}"
    if config.low_memory:
        return "low_memory=True"
    return f"{config.num_beams} beams, more than {MOST_BEAMS}" if config.num_beams > MOST_BEAMS else None


def _powers(exponent: float, most: int) -> tuple[float, ...] | None:
    """Python's powers, as Transformers computes them; None if one has no float."""
    try:
        return (1.0, *(float(count**exponent) for count in range(1, most + 1)))
    except OverflowError:
        return None
