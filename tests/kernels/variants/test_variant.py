"""`Variant`: what it takes, and what each wrong one is told."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import hf_fastattn
from hf_fastattn.kernels.attention.variant_reference import variant_attention
from hf_fastattn.kernels.variants.variant import Variant
from tests.kernels.cases import make_batch
from tests.kernels.variants.test_reference import plan_of


def score(score, b, h, q_idx, kv_idx):
    return score


def biased(score, b, h, q_idx, kv_idx, bias, factor=1.0):
    return score + bias[h] * factor


BIAS = torch.zeros(4)
WRONG = {
    "no function": ({"score_mod": 3}, TypeError, "score_mod must be a function.*got 3"),
    "too few arguments": (
        {"score_mod": lambda s, h: s},
        TypeError,
        r"score_mod is called with \(score, b, h, q_idx, kv_idx\)",
    ),
    "too many arguments": ({"mask_mod": score}, TypeError, "mask_mod is called with.*missing"),
    "a parameter that is not there": ({"score_mod": biased}, TypeError, "missing a required argument: 'bias'"),
    "a parameter that nobody reads": ({"score_mod": score, "parameters": {"bias": BIAS}}, ValueError, "'bias'.*none"),
    "parameters in a list": ({"parameters": [BIAS]}, TypeError, "parameters must be a dict"),
    "a parameter of text": ({"score_mod": biased, "parameters": {"bias": "x"}}, TypeError, "parameters\\['bias'\\].*str"),
    "a window of 0": ({"window": 0}, ValueError, "window=0 must be at least 1"),
    "half a window": ({"window": 1.5}, TypeError, "window must be a number of keys.*1.5"),
    "a negative softcap": ({"softcap": -1.0}, ValueError, "softcap=-1.0 must be positive"),
    "an endless softcap": ({"softcap": float("inf")}, ValueError, "softcap=inf"),
    "softcap as text": ({"softcap": "30"}, TypeError, "softcap must be a number.*'30'"),
    "another normaliser": ({"normalizer": "relu"}, ValueError, "normalizer='relu'.*sigmoid"),
    "sinks as a list": ({"sinks": [0.0]}, TypeError, r"sinks must be a tensor \[H\]"),
    "sinks of two dimensions": ({"sinks": torch.zeros(2, 2)}, ValueError, r"sinks is torch.float32 of shape \(2, 2\)"),
    "slopes of integers": ({"alibi": torch.arange(4)}, ValueError, "alibi is torch.int64"),
    "sinks without a sum": ({"sinks": BIAS, "normalizer": "sigmoid"}, ValueError, "sinks add to the sum of a softmax"),
    "causal as text": ({"causal": "no"}, TypeError, "causal must be True or False"),
    "an unknown field": ({"rotary": "inside"}, TypeError, "rotary"),
    "an unknown place of RoPE": ({"rope": "outside"}, ValueError, "rope='outside'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name):
    fields, kind, words = WRONG[name]
    with pytest.raises(kind) as error:
        Variant(**fields)
    assert re.search(words, str(error.value)), str(error.value)


def test_it_is_public():
    assert hf_fastattn.Variant is Variant


def test_parameters_are_given_by_name():
    batch = make_batch([3], [4], ratio=2)
    inputs = (batch.q, batch.k_pages, batch.v_pages, plan_of(batch))
    bias = torch.tensor([0.0, 3.0, 0.0, -2.0])

    def with_position(score, b, h, q_idx, kv_idx):
        return score + bias[h] * 2.0 * kv_idx

    def given(score, b, h, q_idx, kv_idx, *, table, factor):
        return score + table[h] * factor * kv_idx

    want, _ = variant_attention(*inputs, Variant(score_mod=with_position), scale=batch.scale)
    variant = Variant(score_mod=given, parameters={"table": bias, "factor": 2.0})
    got, _ = variant_attention(*inputs, variant, scale=batch.scale)
    plain, _ = variant_attention(*inputs, Variant(), scale=batch.scale)
    assert torch.equal(got, want) and not torch.allclose(got, plain)


def test_functions_see_visible_pairs_only():
    seen = []

    def noted(score, b, h, q_idx, kv_idx):
        seen.append(q_idx - kv_idx)
        return score + torch.zeros(3)[q_idx - kv_idx]

    batch = make_batch([5, 1], [0, 20])
    variant_attention(batch.q, batch.k_pages, batch.v_pages, plan_of(batch), Variant(score_mod=noted, window=3), scale=1.0)
    assert seen


def test_it_can_be_copied():
    assert copy.deepcopy(Variant(score_mod=score, softcap=2.0)).softcap == 2.0
