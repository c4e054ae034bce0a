"""`LoopRequest`: what a `generate()` call asks of the decode loop, read from what Transformers made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria

from hf_fastattn.kernels.sampling.loop_tensors import MOST_ENDS, MOST_ROWS
from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.loop.forced_tokens import ForcedTokens
from hf_fastattn.loop.known_class import why_not_class
from hf_fastattn.loop.known_processors import IN_KERNELS, WARPERS, in_order, step_processors
from hf_fastattn.loop.step_processor import StepProcessor

CRITERIA = (criteria.MaxLengthCriteria, criteria.EosTokenCriteria, criteria.StopStringCriteria)


@dataclass(frozen=True)
class LoopRequest:
    """How tokens are chosen and when a call ends.

    Attributes:
        do_sample: draw, or take the likeliest.
        max_new: new tokens a row, at most.
        ends: end tokens; their rows get `pad` from then on.
        suppressed: end tokens that are not chosen before the least number of new tokens.
        pad: padding token.
        choice: temperature, filters, penalty, least number of new tokens.
        ignored: leading prompt tokens that the penalty does not count, a number or one a row.
        stop_strings: the criterion, if there are any.
        processors: those that have no kernel, in their order.
        forced: tokens that rows take whatever is likeliest, if there are any.
    """

    do_sample: bool
    max_new: int
    ends: tuple[int, ...]
    suppressed: tuple[int, ...]
    pad: int
    choice: SamplingParams
    ignored: int | Tensor
    stop_strings: Any
    processors: tuple[StepProcessor, ...] = ()
    forced: ForcedTokens | None = None

    def fits(self, vocabulary: int) -> bool:
        """Whether logits of this size have all tokens that processors name."""
        if self.forced is not None and self.forced.largest >= vocabulary:
            return False
        return all(0 <= token < vocabulary for one in self.processors for token in one.named())


def loop_request(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    streamer: Any,
    rows_are_private: bool,
) -> LoopRequest | str:
    """The request of a call, or why `DecodeLoop` cannot serve it.

    Args:
        rows_are_private: nobody sees the cache after the call.
    """
    config = generation_config
    unknown = why_not_class(model)
    if unknown is not None:
        return unknown
    if config.is_assistant:
        return "the model drafts for another"
    for wish in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, wish):
            return f"{wish} is asked for"
    if not config.use_cache:
        return "use_cache=False: steps compute all tokens again"
    found = in_order(logits_processor)
    if isinstance(found, str):
        return found
    stops = {type(criterion): criterion for criterion in stopping_criteria}
    others = [kind.__name__ for kind in stops if kind not in CRITERIA]
    if others or len(stops) < len(stopping_criteria):
        asked = f"{', '.join(others)}: known are max_new_tokens, end tokens and stop strings" if others else "given twice"
        return f"stopping criteria {asked}"
    if criteria.MaxLengthCriteria not in stops:
        return "no length is set at which to stop: give max_new_tokens"
    if config.do_sample and model._fastattn.runtime.config.sampling == "transformers":
        return "sampling='transformers': patch with sampling='fast' for draws on the device"
    eos, strings = stops.get(criteria.EosTokenCriteria), stops.get(criteria.StopStringCriteria)
    ends = () if eos is None else tuple(torch.as_tensor(eos.eos_token_id, device="cpu").flatten().tolist())
    if strings is not None and (eos is None or (not rows_are_private and input_ids.shape[0] > 1)):
        return "rows go on after a stop string if the cache is returned or there is no end token: give eos_token_id"
    suppressed, min_new = _suppressed(found, input_ids.shape[1])
    if len(ends) > MOST_ENDS or len(suppressed) > MOST_ENDS or input_ids.shape[0] > MOST_ROWS:
        return f"{max(len(ends), len(suppressed))} end tokens, {input_ids.shape[0]} rows"
    max_new = stops[criteria.MaxLengthCriteria].max_length - input_ids.shape[1]
    if max_new < 1:
        return "there is no room for a token"
    forced = found.get(ForcedTokens)
    if forced is not None:
        # Only the host knows of stop strings, and some steps late.
        by_text = "tokens are forced, and rows end by stop strings" if strings is not None else None
        why_not_forced = by_text or forced.why_not(input_ids.shape[0], max_new, bool(config.do_sample))
        if why_not_forced is not None:
            return why_not_forced
    for kind in WARPERS:
        warper = found.get(kind)
        if getattr(warper, "filter_value", -torch.inf) != -torch.inf or getattr(warper, "min_tokens_to_keep", 1) != 1:
            return f"a {kind.__name__} with its own filter_value or min_tokens_to_keep"
    penalty = found.get(processors.RepetitionPenaltyLogitsProcessor)
    ignored = getattr(penalty, "prompt_ignore_length", None)
    # With inputs_embeds the ignored prompt length counts columns that input_ids lacks.
    most_ignored = int(ignored.max()) if isinstance(ignored, Tensor) else ignored or 0
    if most_ignored > input_ids.shape[1]:
        return "a repetition penalty that ignores new tokens"
    temperature, top_k, top_p, min_p = (found.get(kind) for kind in IN_KERNELS[3:])
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    if not 0 <= pad < model.config.get_text_config(decoder=True).vocab_size:
        # Steps launched ahead of the end embed the padding token, even for a single row.
        return f"pad_token_id={pad} is no token of the model: give one of its tokens"
    steps = step_processors(found, input_ids.shape[1], bool(config.do_sample))
    if isinstance(steps, str):
        return steps
    return LoopRequest(
        do_sample=bool(config.do_sample),
        max_new=max_new,
        ends=ends,
        suppressed=suppressed,
        pad=pad,
        choice=SamplingParams(
            temperature=1.0 if temperature is None else float(temperature.temperature),
            top_k=0 if top_k is None else int(top_k.top_k),
            top_p=1.0 if top_p is None else float(top_p.top_p),
            min_p=0.0 if min_p is None else float(min_p.min_p),
            repetition_penalty=1.0 if penalty is None else float(penalty.penalty),
            min_new_tokens=min_new,
        ),
        ignored=0 if ignored is None else ignored,
        stop_strings=strings,
        processors=steps,
        forced=forced,
    )


def _suppressed(found: dict[type, Any], prompt: int) -> tuple[tuple[int, ...], int]:
    """End tokens that are not to be chosen at first, and for how many new tokens."""
    by_length = found.get(processors.MinLengthLogitsProcessor)
    by_new = found.get(processors.MinNewTokensLengthLogitsProcessor)
    least = [] if by_length is None else [(by_length.min_length - prompt, by_length)]
    least += [] if by_new is None else [(by_new.prompt_length_to_skip + by_new.min_new_tokens - prompt, by_new)]
    # Both suppress the same end tokens, so the longer one decides.
    if not least:
        return (), 0
    count, processor = max(least, key=lambda entry: entry[0])
    return tuple(torch.as_tensor(processor.eos_token_id, device="cpu").flatten().tolist()), max(count, 0)
