"""Sums of weights that a device makes beside the beginning of a call are of the weights that the call computes with."""

from __future__ import annotations

import pytest
import torch

import hf_fastattn
from hf_fastattn.graphs import model_state
from tests.generation.calls import run
from tests.generation.test_prefix_stale import PROMPT, one_bit
from tests.tools.models import assert_fast, tiny


class Sums:
    """Stands for sums under way on a device: they hold what the weights were when they were begun."""

    made = 0

    def __init__(self, table: list[torch.Tensor]) -> None:
        self._held = [float(tensor.detach().double().sum()) for tensor in table]
        type(self).made += 1

    def sums(self) -> list[float]:
        return self._held


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> type[Sums]:
    """The weights of a CPU as a device's, which are summed beside what it does."""
    monkeypatch.setattr(model_state, "_is_whole", lambda tensor: True)
    monkeypatch.setattr(model_state, "whole_words", lambda tensors: None)
    monkeypatch.setattr(model_state, "_table", list)
    monkeypatch.setattr(model_state, "Launched", Sums)
    monkeypatch.setattr(Sums, "made", 0)
    return Sums


def test_weights_are_summed_once_a_call_from_its_beginning_on(beside: type[Sums]) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    states = model._fastattn.runtime.model_state
    for number in range(3):
        run(model, PROMPT)
        assert beside.made == 1 + number and not states._begun
    assert assert_fast(model, held=None).tokens_reused == 69
    one_bit(model)
    run(model, PROMPT)
    assert assert_fast(model, held=None).tokens_reused == 0 and beside.made == 4


def test_what_was_begun_for_a_call_that_did_not_ask_serves_no_other(beside: type[Sums]) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    states = model._fastattn.runtime.model_state
    run(model, PROMPT)
    ids = PROMPT["input_ids"]
    # Its prompt is no sequence of tokens.
    model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert not states._begun
    states.begin(model._fastattn.decoder(model))
    states.forget()
    one_bit(model)
    run(model, PROMPT)
    assert assert_fast(model, held=None).tokens_reused == 0


def test_sums_begun_of_other_tensors_are_not_taken(beside: type[Sums]) -> None:
    model = hf_fastattn.patch(tiny("llama"), prefix_cache=True)
    states, decoder = model._fastattn.runtime.model_state, model._fastattn.decoder(model)
    before = states._sums(model_state._weights_once(decoder))
    states.begin(decoder)
    held = decoder.layers[0].mlp.up_proj
    held.weight = torch.nn.Parameter(held.weight + 1)
    assert states._sums(model_state._weights_once(decoder)) != before
    assert not states._begun


@pytest.mark.gpu
def test_sums_beside_are_those_of_weights_written_just_before() -> None:
    model = hf_fastattn.patch(tiny("llama").to("cuda"), prefix_cache=True)
    states, decoder = model._fastattn.runtime.model_state, model._fastattn.decoder(model)
    before = states.of(decoder, decoder.device)
    states.begin(decoder)
    assert states._begun
    assert states.of(decoder, decoder.device) == before and not states._begun
    weight = decoder.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        # The stream is busy for milliseconds before it writes.
        torch.cuda._sleep(20_000_000)
        weight.data[0, 0] += 1
        states.begin(decoder)
    assert states.of(decoder, decoder.device) != before
