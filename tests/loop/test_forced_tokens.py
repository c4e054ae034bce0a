"""Tokens that a call forces: the device's loop takes them and says how likely they were, as Transformers' own loop does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import hf_fastattn
from hf_fastattn.loop import decode_loop
from hf_fastattn.loop.forced_tokens import ForcedTokens
from tests.loop.test_decode_loop import ENDS, assert_looped, both, run
from tests.tools.combinations import rest_on_a_gpu
from tests.tools.models import VOCAB, padded_batch

NEW = 12
END = 2
pytestmark = pytest.mark.usefixtures("device")


def tokens_of(rows: int, new: int = NEW, ends: Sequence[int] = ()) -> Tensor:
    """Random tokens, with the end token at `ends[b]` of row b."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCAB, (rows, new), generator=generator)
    for row, step in enumerate(ends):
        tokens[row, step] = END
    return tokens


def forced(model: Any, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, ForcedTokens]:
    ends = [END] if "eos_token_id" in kwargs else []
    processor = ForcedTokens(tokens, ends)
    out = run(model, tokens.shape[1], logits_processor=LogitsProcessorList([processor]), **kwargs)
    return out, processor


ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.4, "eos_token_id": END},
    {"eos_token_id": END},
    {"suppress_tokens": ENDS},
    {"return_dict_in_generate": True},
)


FAMILIES = ("llama", "qwen2_window", "qwen3_moe", "qwen3_5")
# What is asked for concerns no layer.
ON_THE_CPU = [("llama", kwargs) for kwargs in ASKED] + [(family, kwargs) for family in FAMILIES[1:] for kwargs in ASKED[:2]]


@pytest.mark.parametrize(
    ("family", "kwargs"), rest_on_a_gpu(ON_THE_CPU, [(family, kwargs) for family in FAMILIES for kwargs in ASKED])
)
def test_as_in_transformers_loop(device: str, family: str, kwargs: dict[str, Any]) -> None:
    stock, model = both(family, device)
    rows = len(padded_batch()["input_ids"])
    tokens = tokens_of(rows, ends=[4, 9] if "eos_token_id" in kwargs else [])
    want, theirs = forced(stock, tokens, **kwargs)
    got, ours = forced(model, tokens, **kwargs)
    if "return_dict_in_generate" in kwargs:
        want, got = want.sequences.cpu(), got.sequences.cpu()
    assert hf_fastattn.report(model).last_call.fast_loops == 1
    assert torch.equal(got, want)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-3, rtol=0, equal_nan=True)
    assert torch.equal(ours.choices, theirs.choices)
    taken = NEW * rows - (NEW - 5 + NEW - 10 if "eos_token_id" in kwargs else 0)
    assert int((ours.choices >= 0).sum()) == int((~ours.logprobs.isnan()).sum()) == taken
    # A call that forces nothing chooses for itself again, and so does the one after.
    assert torch.equal(run(model), run(stock)) and assert_looped(model)


def test_rows_keep_their_tokens_when_others_leave(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loop, "WORTH_CAPTURING", 1)
    stock, model = both("llama", device)
    ids = torch.randint(3, VOCAB, (7, 9), generator=torch.Generator().manual_seed(1))
    # Of 5 rows 2 leave at once: the step of 4 has a padding row, in the place of one that goes on.
    tokens = tokens_of(7, 30, ends=[3, 25, 5, 29, 5, 3, 20])
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": END}
    want, theirs = forced(stock, tokens, **kwargs)
    got, ours = forced(model, tokens, **kwargs)
    assert assert_looped(model).graphs_captured > 2
    assert torch.equal(got, want) and torch.equal(ours.choices, theirs.choices)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-3, rtol=0, equal_nan=True)


def test_longer_calls_than_before(device: str) -> None:
    stock, model = both("llama", device)
    rows = len(padded_batch()["input_ids"])
    for new in (5, 70, 5):
        want, theirs = forced(stock, tokens_of(rows, new))
        got, ours = forced(model, tokens_of(rows, new))
        assert assert_looped(model) and torch.equal(got, want)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"do_sample": True}, "tokens are forced and drawn"),
        ({"num_beams": 2}, "tokens are forced"),
        ({"max_new_tokens": NEW - 2, "do_sample": True}, "tokens are forced and drawn"),
    ],
)
def test_what_the_loop_leaves_to_transformers(device: str, kwargs: dict[str, Any], reason: str) -> None:
    _, model = both("llama", device)
    rows = len(padded_batch()["input_ids"]) * kwargs.get("num_beams", 1)
    processor = ForcedTokens(tokens_of(rows))
    out = run(model, logits_processor=LogitsProcessorList([processor]), **{"max_new_tokens": NEW, **kwargs})
    call = hf_fastattn.report(model).last_call
    assert not call.fast_loops and any(reason in why for why in call.not_looped), call.not_looped
    if "num_beams" not in kwargs:
        assert torch.equal(out[:, 37:], tokens_of(rows)[:, : out.shape[1] - 37])


def test_mistakes(device: str) -> None:
    for tokens, error, words in (
        (torch.ones(2, 3), TypeError, "int64"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"\[rows, new tokens\]"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"\[rows, new tokens\]"),
        (torch.full((2, 3), -1), ValueError, "negative"),
    ):
        with pytest.raises(error, match=words):
            ForcedTokens(tokens)
    stock, model = both("llama", device)
    rows = len(padded_batch()["input_ids"])
    for one in (stock, model):
        with pytest.raises(ValueError, match="one call an object"):
            run(one, NEW + 1, logits_processor=LogitsProcessorList([ForcedTokens(tokens_of(rows))]))
    assert torch.equal(run(model), run(stock)) and assert_looped(model)
