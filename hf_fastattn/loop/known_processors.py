"""Which of Transformers' logits processors a recorded step knows, in which order, and what each of them asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import logits_process as hf

from hf_fastattn.loop.forced_tokens import ForcedTokens
from hf_fastattn.loop.step_processor import StepProcessor
from hf_fastattn.loop.step_processors import (
    Epsilon,
    Eta,
    Finite,
    ForceFirst,
    ForceLast,
    Normalise,
    RaiseEnds,
    Suppress,
    SuppressAt,
    Typical,
)
from hf_fastattn.loop.step_sequences import BadWords, Bias, NoRepeats
from hf_fastattn.transformers_version import ENDS_MAY_BE_SUPPRESSED

# Longest sequences that are compared with the ends of rows: each token is a launch or two.
LONGEST = 32
# Those with kernels of their own, which read their parameters from `SamplingParams`.
IN_KERNELS = (
    hf.RepetitionPenaltyLogitsProcessor,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
)
# In the order in which Transformers applies them; those that stand together come in any order.
ORDER: tuple[tuple[type, ...], ...] = (
    (hf.SequenceBiasLogitsProcessor,),
    IN_KERNELS[:1],
    (hf.NoRepeatNGramLogitsProcessor,),
    (hf.NoBadWordsLogitsProcessor,),
    IN_KERNELS[1:2],
    IN_KERNELS[2:3],
    (
        hf.ForcedBOSTokenLogitsProcessor,
        hf.ForcedEOSTokenLogitsProcessor,
        hf.InfNanRemoveLogitsProcessor,
        hf.ExponentialDecayLengthPenalty,
        hf.SuppressTokensLogitsProcessor,
        hf.SuppressTokensAtBeginLogitsProcessor,
    ),
    # Processors that a call is given come before those of draws.
    (ForcedTokens,),
    *((kind,) for kind in IN_KERNELS[3:]),
    # They look at what those before have left, so Transformers' order is kept among them.
    (hf.TypicalLogitsWarper,),
    (hf.EpsilonLogitsWarper,),
    (hf.EtaLogitsWarper,),
    (hf.LogitNormalization,),
)
WARPERS = (*IN_KERNELS[3:], hf.TypicalLogitsWarper, hf.EpsilonLogitsWarper, hf.EtaLogitsWarper)
PLACES = {kind: place for place, kinds in enumerate(ORDER) for kind in kinds}


def in_order(given: Sequence[Any]) -> dict[type, Any] | str:
    """The processors by type, in the given order, if they are known ones in the known order; else why not."""
    unknown = [type(processor).__name__ for processor in given if type(processor) not in PLACES]
    if unknown:
        return f"a {unknown[0]} looks at the logits"
    places = [PLACES[type(processor)] for processor in given]
    found = {type(processor): processor for processor in given}
    if places != sorted(places) or len(found) < len(given):
        return "logits processors in another order than Transformers', or given twice"
    return found


def step_processors(found: dict[type, Any], prompt: int, do_sample: bool) -> tuple[StepProcessor, ...] | str:
    """What a step does beside its kernels, or why it cannot.

    Args:
        found: the processors, of `in_order`.
        prompt: columns of the prompt.
    """
    steps: list[StepProcessor] = []
    for kind, processor in found.items():
        if kind in IN_KERNELS or kind is ForcedTokens or (kind is hf.LogitNormalization and do_sample):
            # The choice itself forces tokens, and draws are of the normalised scores anyway.
            continue
        read = READERS[kind](processor, prompt)
        if isinstance(read, str):
            return read
        if read is not None:
            steps.append(read)
    before = len(set(found) - set(WARPERS) - {hf.LogitNormalization})
    if RaiseEnds in map(type, steps) and not ENDS_MAY_BE_SUPPRESSED and before > 1:
        return "this Transformers makes NaN of end tokens that another processor suppressed"
    return tuple(steps)


def _tokens(given: Any) -> tuple[int, ...]:
    return tuple(torch.as_tensor(given, device="cpu").flatten().tolist())


def _suppress(given: Any, prompt: int) -> StepProcessor:
    return Suppress(_tokens(given.suppress_tokens))


def _suppress_at(given: Any, prompt: int) -> StepProcessor | None:
    at = given.begin_index - prompt
    return SuppressAt(_tokens(given.begin_suppress_tokens), at) if at >= 0 else None


def _force_first(given: Any, prompt: int) -> StepProcessor | None:
    return ForceFirst(_tokens(given.bos_token_id), 1 - prompt) if prompt <= 1 else None


def _force_last(given: Any, prompt: int) -> StepProcessor | None:
    at = given.max_length - 1 - prompt
    return ForceLast(_tokens(given.eos_token_id), at) if at >= 0 else None


def _finite(given: Any, prompt: int) -> StepProcessor:
    return Finite()


def _raise_ends(given: Any, prompt: int) -> StepProcessor | str:
    start = given.regulation_start
    if start != int(start):
        return f"an exponential decay that starts at {start}"
    return RaiseEnds(_tokens(given.eos_token_id), int(start) - prompt, float(given.regulation_factor))


def _bias(given: Any, prompt: int, kind: type[Bias] = Bias) -> StepProcessor | str:
    sequences = tuple(tuple(map(int, sequence)) for sequence in given.sequence_bias)
    if not all(1 <= len(sequence) <= LONGEST for sequence in sequences):
        return f"sequences of no token or more than {LONGEST} in a {type(given).__name__}"
    # Releases that compare sequence by sequence pass over those that are as long as the row and one token more.
    return kind(sequences, tuple(map(float, given.sequence_bias.values())), not hasattr(given, "multi_token_biases"))


def _bad_words(given: Any, prompt: int) -> StepProcessor | str:
    return _bias(given, prompt, BadWords)


def _no_repeats(given: Any, prompt: int) -> StepProcessor | str:
    size = int(given.ngram_size)
    return NoRepeats(size) if size <= LONGEST else f"no_repeat_ngram_size={size} is more than {LONGEST}"


def _typical(given: Any, prompt: int) -> StepProcessor:
    return Typical(float(given.mass))


def _epsilon(given: Any, prompt: int) -> StepProcessor:
    return Epsilon(float(given.epsilon))


def _eta(given: Any, prompt: int) -> StepProcessor:
    return Eta(float(given.epsilon))


def _normalise(given: Any, prompt: int) -> StepProcessor:
    return Normalise()


READERS: dict[type, Callable[[Any, int], StepProcessor | str | None]] = {
    hf.SequenceBiasLogitsProcessor: _bias,
    hf.NoRepeatNGramLogitsProcessor: _no_repeats,
    hf.NoBadWordsLogitsProcessor: _bad_words,
    hf.ForcedBOSTokenLogitsProcessor: _force_first,
    hf.ForcedEOSTokenLogitsProcessor: _force_last,
    hf.InfNanRemoveLogitsProcessor: _finite,
    hf.ExponentialDecayLengthPenalty: _raise_ends,
    hf.SuppressTokensLogitsProcessor: _suppress,
    hf.SuppressTokensAtBeginLogitsProcessor: _suppress_at,
    hf.TypicalLogitsWarper: _typical,
    hf.EpsilonLogitsWarper: _epsilon,
    hf.EtaLogitsWarper: _eta,
    hf.LogitNormalization: _normalise,
}
