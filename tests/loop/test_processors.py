"""Logits processors in the device's loop: stock's greedy tokens with each and with mixtures, and no stale parameters.

On the CPU nothing is recorded: steps run again over their static tensors (`reexecuted_loop`).
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TypicalLogitsWarper,
)

import hf_fastattn
from hf_fastattn.hints import with_hint
from hf_fastattn.kernels.sampling import reference
from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.loop import decode_loop, known_processors, token_choice
from hf_fastattn.loop.forced_tokens import ForcedTokens
from hf_fastattn.loop.processor_state import ProcessorState
from hf_fastattn.loop.step_processor import FIRST
from hf_fastattn.loop.step_sequences import Bias
from hf_fastattn.transformers_version import ENDS_MAY_BE_SUPPRESSED
from tests.loop.test_decode_loop import ENDS, assert_looped, both, run
from tests.tools.models import OLD, VOCAB, padded_batch, pair_with_graphs, single, tiny

NEW = 24
# What stock chooses without processors: each list below hits tokens that would come.
LIKELY = list(range(0, VOCAB, 2))


pytestmark = pytest.mark.usefixtures("device")


def some(seed: int, count: int, length: int = 1) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(1, VOCAB) for _ in range(length)] for _ in range(count)]


def words_of(model: Any, **kwargs: Any) -> list[list[int]]:
    """Words of two to four tokens that the greedy path holds."""
    # Some releases refuse a bias on the token 0.
    path = run(model, NEW, **kwargs)[0, 37:].clamp(min=1).tolist()
    return [path[3:5], path[8:11], path[14:18]]


ONE: dict[str, Any] = {"input_ids": torch.tensor([[3], [4]]), "attention_mask": None}
EACH: list[dict[str, Any]] = [
    {"suppress_tokens": LIKELY},
    {"begin_suppress_tokens": LIKELY},
    {"forced_eos_token_id": 5},
    {"forced_eos_token_id": [9, 70], "eos_token_id": ENDS[:2]},
    {"forced_bos_token_id": 7, **ONE},
    {"forced_bos_token_id": 7, "begin_suppress_tokens": LIKELY, **ONE},
    {"forced_bos_token_id": 7},
    {"remove_invalid_values": True, "suppress_tokens": LIKELY},
    {"exponential_decay_length_penalty": (6, 1.3), "eos_token_id": ENDS},
    {"sequence_bias": [[[token], 4.0] for token in LIKELY[1:20]]},
    {"sequence_bias": [[[token], -8.0] for token in LIKELY[1:]], "repetition_penalty": 1.3},
    {"bad_words_ids": [[token] for token in LIKELY], "eos_token_id": LIKELY[:3]},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.7},
    {"renormalize_logits": True},
]


@pytest.mark.parametrize("kwargs", EACH, ids=lambda kwargs: "+".join(kwargs))
def test_each(device: str, kwargs: dict[str, Any]) -> None:
    stock, model = both("llama", device)
    want = run(stock, NEW, **kwargs)
    assert torch.equal(run(model, NEW, **kwargs), want)
    assert_looped(model)
    without = {name: value for name, value in kwargs.items() if name in ("input_ids", "attention_mask", "eos_token_id")}
    same = kwargs.keys() <= {"forced_bos_token_id", "renormalize_logits"}
    assert torch.equal(run(stock, NEW, **without), want) == same


@pytest.mark.parametrize("name", ["bad_words_ids", "sequence_bias"])
def test_words_of_several_tokens(device: str, name: str) -> None:
    stock, model = both("llama", device)
    words = words_of(stock)
    values: list[Any] = words if name == "bad_words_ids" else [[word, -30.0] for word in words]
    want = run(stock, NEW, **{name: values})
    assert torch.equal(run(model, NEW, **{name: values}), want) and not torch.equal(want, run(stock, NEW))
    assert_looped(model)


def test_a_word_that_the_prompt_has_begun(device: str) -> None:
    stock, model = both("llama", device)
    # Shorter than what the word begins with, as long, and as long as the word.
    for length in (2, 3, 4):
        ids = torch.full((1, length), 11)
        first = int(run(stock, 1, input_ids=ids, attention_mask=None)[0, -1])
        kwargs = {"input_ids": ids, "attention_mask": None, "bad_words_ids": [[11, 11, 11, first]]}
        want = run(stock, NEW, **kwargs)
        assert torch.equal(run(model, NEW, **kwargs), want)
        assert_looped(model)


def test_parameters_of_another_call_are_not_used(device: str) -> None:
    stock, model = both("llama", device)
    calls: list[dict[str, Any]] = [
        {"suppress_tokens": LIKELY}, {"suppress_tokens": LIKELY[1:4]}, {},
        {"bad_words_ids": words_of(stock)}, {"bad_words_ids": [*words_of(stock)[:2], [5]]}, {"bad_words_ids": some(3, 3, 4)},
        {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 2, **single(20)},
        {"forced_eos_token_id": 5}, {"forced_eos_token_id": 6, "max_new_tokens": 9},
    ]  # fmt: skip
    for kwargs in calls:
        assert torch.equal(run(model, **{"new": NEW, **kwargs}), run(stock, **{"new": NEW, **kwargs})), kwargs
        assert_looped(model)
    # Other values are no other steps.
    run(model, NEW, suppress_tokens=LIKELY[7:9])
    run(model, NEW, bad_words_ids=some(4, 3, 4))
    assert assert_looped(model).graphs_captured == 0


def test_longer_rows_than_any_before(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.loop.processor_state.MIN_COLUMNS", 32)
    stock, model = both("llama", device)
    for length in (20, 90, 20):
        kwargs = {**padded_batch(3, length), "no_repeat_ngram_size": 2}
        assert torch.equal(run(model, NEW, **kwargs), run(stock, NEW, **kwargs))
        assert_looped(model)
    # A graph reads the tensor that it was captured with.
    assert {key.history for key in model._fastattn.runtime.loop_graphs._entries} == {64, 128}


def test_rows_that_end_leave_the_batch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "WORTH_CAPTURING", 1)
    stock, model = both("llama", device)
    lengths = [5, 24, 3, 17, 9, 24, 11, 20, 2]
    model._fastattn.runtime.row_limits = lengths
    kwargs = {**padded_batch(9, 37), "no_repeat_ngram_size": 1, "bad_words_ids": [[5], *words_of(stock)]}
    want = run(stock, NEW, **kwargs)
    for row, length in enumerate(lengths):
        want[row, 37 + length :] = 0
    assert torch.equal(run(model, NEW, **kwargs), want)
    assert_looped(model)


def mixture(seed: int, words: list[list[int]]) -> dict[str, Any]:
    """Some processors of a seed, with their parameters."""
    source = random.Random(seed)
    tokens = [source.randrange(1, VOCAB) for _ in range(40)]
    # Transformers refuses to force a token that is suppressed.
    first, last = [token for token in range(1, VOCAB) if token not in tokens[:30]][-2:]
    longer = [*words, *some(seed, 3, 3), [tokens[0]], tokens[1:3]]
    choices: list[dict[str, Any]] = [
        {"suppress_tokens": tokens[:20]},
        {"begin_suppress_tokens": tokens[10:30]},
        {"forced_eos_token_id": last},
        {"forced_bos_token_id": first},
        {"remove_invalid_values": True},
        {"sequence_bias": [[word, source.uniform(-20, 9)] for word in longer]},
        {"bad_words_ids": longer},
        {"no_repeat_ngram_size": source.randint(1, 4)},
        {"repetition_penalty": source.choice([0.8, 1.3, 2.0])},
        {"eos_token_id": tokens[32:35], "min_new_tokens": source.randint(1, 12)},
        {"eos_token_id": tokens[32:35], "min_length": source.randint(5, 50)},
        {"renormalize_logits": True},
    ]  # fmt: skip
    if ENDS_MAY_BE_SUPPRESSED:
        decay = (source.randint(0, 9), source.choice([0.7, 1.1, 1.5]))
        choices.append({"eos_token_id": tokens[32:35], "exponential_decay_length_penalty": decay})
    wishes: dict[str, Any] = padded_batch(source.choice([1, 2, 5]), source.choice([1, 9, 37]), seed=source.randint(1, 9))
    for choice in source.sample(choices, source.randint(2, 6)):
        wishes.update(choice)
    return wishes


@pytest.mark.filterwarnings("ignore:Unfeasible length")
def test_mixtures(device: str) -> None:
    stock, model = (one.to(device) for one in pair_with_graphs("llama", num_hidden_layers=1))
    words = words_of(stock)
    for seed in range(60):
        kwargs = mixture(seed, words)
        assert torch.equal(run(model, 12, **kwargs), run(stock, 12, **kwargs)), (seed, sorted(kwargs))
        assert_looped(model)


@pytest.mark.skipif(OLD, reason="embeddings as prompts need their own preparation there")
def test_embeddings_as_prompt(device: str) -> None:
    """No token of the prompt is known."""
    stock, model = both("llama", device)
    embeds = stock.get_input_embeddings()(padded_batch()["input_ids"].to(device))
    kwargs = {
        "input_ids": None, "inputs_embeds": embeds, "no_repeat_ngram_size": 2, "begin_suppress_tokens": LIKELY,
        "bad_words_ids": some(2, 20), "forced_eos_token_id": 5, "forced_bos_token_id": 9,
    }  # fmt: skip
    assert torch.equal(run(model, NEW, **kwargs), run(stock, NEW, **kwargs))
    assert_looped(model)


def test_the_order_is_transformers() -> None:
    """Every known processor, as `generate()` makes them."""
    config = GenerationConfig(
        do_sample=True, sequence_bias=[[[3], 1.0]], repetition_penalty=1.2, no_repeat_ngram_size=2, bad_words_ids=[[4]],
        min_length=9, min_new_tokens=3, forced_bos_token_id=5, forced_eos_token_id=6, remove_invalid_values=True,
        exponential_decay_length_penalty=(3, 1.1), suppress_tokens=[7], begin_suppress_tokens=[8], temperature=0.7,
        top_k=20, top_p=0.9, min_p=0.1, typical_p=0.8, epsilon_cutoff=0.1, eta_cutoff=0.1, renormalize_logits=True,
        eos_token_id=9, pad_token_id=0, max_length=40,
    )  # fmt: skip
    stock = tiny("llama")
    stock._prepare_special_tokens(config, device="cpu")
    made = stock._get_logits_processor(config, input_ids_seq_length=1, device="cpu", model_kwargs={})
    found = known_processors.in_order(made)
    assert not isinstance(found, str) and list(found.values()) == list(made)
    # Our own is made by no option.
    assert set(found) == set(known_processors.PLACES) - {ForcedTokens}
    assert isinstance(known_processors.in_order(made[::-1]), str)


def test_scores_are_fp32_from_the_first_processor_on() -> None:
    """A bias that is lost in 16 bits decides."""
    logits = torch.tensor([[1.0, 100.0, 100.0]], dtype=torch.bfloat16)
    biases = Bias(((1,), (2,)), (0.01, 0.02), False)
    state = ProcessorState(torch.device("cpu"), 1, 3)
    state.begin([biases], torch.zeros(1, 1, dtype=torch.int64), 1)
    scores = state.apply([(Bias, biases.sizes())], FIRST, logits, torch.zeros(1, dtype=torch.int32))
    want = SequenceBiasLogitsProcessor([[[1], 0.01], [[2], 0.02]])(torch.zeros(1, 1, dtype=torch.int64), logits.float())
    assert torch.equal(scores, want) and scores.argmax() == 2


def test_a_processor_given_by_hand(device: str) -> None:
    """As TRL gives it for models with images."""
    stock, model = both("llama", device)
    given = LogitsProcessorList([SuppressTokensLogitsProcessor(LIKELY)])
    kwargs: dict[str, Any] = {"logits_processor": given, "no_repeat_ngram_size": 2, "begin_suppress_tokens": LIKELY}
    assert torch.equal(run(model, NEW, **kwargs), run(stock, NEW, **kwargs))
    assert_looped(model)


SAMPLED: list[dict[str, Any]] = [
    {"typical_p": 0.7},
    {"typical_p": 0.3, "top_k": 0},
    {"typical_p": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"epsilon_cutoff": 0.02, "top_k": 0},
    {"eta_cutoff": 0.05, "top_k": 0},
    {"typical_p": 0.9, "epsilon_cutoff": 0.02, "eta_cutoff": 0.06, "renormalize_logits": True},
    {"epsilon_cutoff": 0.9},
    {"suppress_tokens": LIKELY, "top_p": 0.8},
    {"suppress_tokens": LIKELY, "typical_p": 0.6, "remove_invalid_values": True},
    {"no_repeat_ngram_size": 1, "bad_words_ids": some(1, 20), "sequence_bias": [[[7], 9.0]], "eta_cutoff": 0.05},
    {"begin_suppress_tokens": LIKELY, "repetition_penalty": 1.3, "renormalize_logits": True},
]


def probabilities_of(model: Any, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens `[B, new]`, and the probabilities `[B, new, V]` that they were drawn with."""
    choose, by_step = token_choice.choose_tokens, {}

    def recorded(logits: torch.Tensor, out_tokens: torch.Tensor, **given: Any) -> None:
        values = [int(value) if place in (1, 5) else value for place, value in enumerate(given["params"].tolist())]
        # A step is run once before it is captured, and what a draw hands to other processors is not the last word.
        by_step[int(given["step"])] = reference.probabilities(logits, SamplingParams(*values)).float().cpu()
        choose(logits, out_tokens, **given)

    with monkeypatch.context() as patch:
        patch.setattr(token_choice, "choose_tokens", recorded)
        new = run(model, **kwargs)[:, kwargs["input_ids"].shape[1] :]
    rows = len(new)
    return new, torch.stack([by_step[step][:rows] for step in range(new.shape[1])], 1)


def scores_along(model: Any, path: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> torch.Tensor:
    """What stock's scores `[B, new, V]` are where it draws the tokens `path [B, new]`."""
    turn = iter(path.T)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda *given, **named: next(turn)[:, None].to(model.device))
        made = run(model, output_scores=True, return_dict_in_generate=True, **kwargs)
    assert torch.equal(made.sequences[:, -path.shape[1] :].cpu(), path)
    return torch.stack(made.scores, 1).cpu()


@pytest.mark.parametrize("kwargs", SAMPLED, ids=lambda kwargs: "+".join(kwargs))
def test_draws_are_of_stocks_scores(device: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("a captured step cannot be looked into")
    stock, model = both("llama", device, {"sampling": "fast"})
    call = {**padded_batch(), "new": 8, "do_sample": True, "temperature": 4.0, **kwargs}
    new, ours = probabilities_of(model, monkeypatch, **call)
    assert_looped(model)
    theirs = scores_along(stock, new, monkeypatch, **call).softmax(-1)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert ((ours > 0).sum(-1) < VOCAB).any()
    assert (ours.gather(2, new[..., None]) > 0).all()


def test_a_warper_given_by_hand_to_a_greedy_call(device: str) -> None:
    """The likeliest token is not among the most typical ones."""
    stock, model = both("llama", device)
    kwargs = {"logits_processor": LogitsProcessorList([TypicalLogitsWarper(0.1)])}
    want = run(stock, NEW, **kwargs)
    assert torch.equal(run(model, NEW, **kwargs), want) and not torch.equal(want, run(stock, NEW))
    assert_looped(model)


class Mine(LogitsProcessor):
    """Halves the scores."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores / 2


class MineOfTheirs(SuppressTokensLogitsProcessor):
    """Suppresses nothing."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"logits_processor": LogitsProcessorList([Mine()])}, "a Mine looks at the logits"),
        ({"logits_processor": LogitsProcessorList([MineOfTheirs(LIKELY)])}, "a MineOfTheirs looks at the logits"),
        ({"logits_processor": LogitsProcessorList(map(SuppressTokensLogitsProcessor, (LIKELY, [])))}, "given twice"),
        ({"logits_processor": LogitsProcessorList([EpsilonLogitsWarper(0.1, min_tokens_to_keep=2)])}, "min_tokens_to_keep"),
        ({"bad_words_ids": [list(range(1, 60))]}, "more than 32"),
        ({"no_repeat_ngram_size": 40}, "more than 32"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is asked for"),
        ({"max_time": 100.0}, "MaxTime"),
        ({"num_beams": 2, "do_sample": True}, "beams are drawn"),
        ({"prompt_lookup_num_tokens": 2, **single()}, "the call asks for assisted generation"),
    ],
)
def test_others_run_transformers_loop_and_the_report_says_why(device: str, kwargs: dict[str, Any], reason: str) -> None:
    stock, model = both("llama", device)
    ours, want = run(model, NEW, **kwargs), run(stock, NEW, **kwargs)
    assert torch.equal(getattr(ours, "sequences", ours), getattr(want, "sequences", want))
    call = hf_fastattn.report(model).last_call
    assert call.fast_loops == 0 and call.forwards > 0
    assert len(call.not_looped) == 1 and reason in next(iter(call.not_looped))
    assert f"Transformers', since {with_hint(next(iter(call.not_looped)))} (1)" in str(hf_fastattn.report(model))


def test_a_token_that_the_head_lacks_fails_as_in_stock(device: str) -> None:
    stock, model = both("llama", device)
    for candidate in (stock, model):
        with pytest.raises(ValueError, match="vocabulary size"):
            run(candidate, NEW, bad_words_ids=[[VOCAB + 3]])
    outside = [VOCAB + 3, -1, *LIKELY]
    assert torch.equal(run(model, NEW, suppress_tokens=outside), run(stock, NEW, suppress_tokens=outside))
    assert_looped(model)
