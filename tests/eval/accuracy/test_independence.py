"""The statistics of draws: uniform and independent numbers pass, others do not, and many tests are corrected for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_fastattn.eval.accuracy.draws import numbers_of
from hf_fastattn.eval.accuracy.independence import chi_squared, holm, independent, sums_to_nothing, tail, uniform
from tests.tools.models import VOCAB, pair


def test_the_chi_squared_distribution_is_known() -> None:
    # Abramowitz and Stegun, 1964, table 26.8.
    for statistic, freedom, expected in ((3.841, 1, 0.05), (16.919, 9, 0.05), (29.588, 10, 0.001)):
        observed, even = np.array([100 + (statistic * 50) ** 0.5, 100 - (statistic * 50) ** 0.5]), np.array([100.0, 100.0])
        assert chi_squared(observed, even, freedom) == pytest.approx(expected, rel=1e-3)


def test_p_values_of_what_is_uniform_and_independent_are_uniform() -> None:
    rng = np.random.default_rng(0)
    found = [(uniform(rng.random(2000)), independent(*rng.random((2, 2000)))) for _ in range(300)]
    for column in zip(*found, strict=True):
        assert uniform(np.array(column)) > 1e-3 and min(column) > 1e-5
    # Counts have steps.
    assert 1e-4 < min(tails := [tail(rng.random(2000)) for _ in range(300)]) and 0.3 < np.mean(tails) < 0.7


def test_what_is_not_is_seen() -> None:
    rng = np.random.default_rng(1)
    numbers = rng.random(4000)
    # A threshold that leaves out the last hundredth of the distribution, and a row that is drawn as another one.
    assert uniform(numbers * 0.95) < 1e-9 and uniform(numbers**1.3) < 1e-6
    assert tail(numbers * 0.97) < 1e-9 and tail(numbers) > 1e-3 and tail(numbers[:100]) == 1
    assert independent(numbers, numbers) == 0 and independent(numbers, np.roll(numbers, 1)) > 1e-3
    # Entries that are none are left out, and too few tell nothing.
    assert uniform(np.where(numbers < 0.5, np.nan, numbers)) < 1e-9
    assert uniform(np.full(50, np.nan)) == uniform(numbers[:6]) == independent(numbers[:9], numbers[:9]) == 1


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_the_numbers_of_draws_are_those_that_they_were_made_by() -> None:
    model = pair("llama")[0]
    prompt = torch.randint(1, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    ids = prompt.repeat(3000, 1)
    logits = model(prompt).logits[0, -1].detach()
    chances = torch.softmax(logits.double(), -1)
    tokens = torch.multinomial(chances, 3000, replacement=True, generator=torch.Generator().manual_seed(1))
    drawn = numbers_of(model, torch.cat((ids, tokens[:, None]), 1), 8, {}, torch.Generator().manual_seed(2))
    assert uniform(drawn.numbers[:, 0]) > 1e-3 and drawn.impossible == 0
    assert sums_to_nothing(drawn.repeats, drawn.variances) > 1e-3 and np.nansum(drawn.variances) > 5
    again = numbers_of(model, torch.cat((ids, ids[:, 3:4]), 1), 8, {}, torch.Generator().manual_seed(2))
    assert sums_to_nothing(again.repeats, again.variances) < 1e-9
    # Beyond the likeliest ten nothing is drawn.
    kept = torch.cat((ids, logits.argsort(descending=True)[torch.arange(3000) % 20, None]), 1)
    assert numbers_of(model, kept, 8, {"top_k": 10}, torch.Generator().manual_seed(2)).impossible == 1500


def test_tokens_after_an_end_are_none() -> None:
    model = pair("llama")[0]
    sequences = torch.tensor([[1, 2, 3, 9, 5, 5], [1, 2, 3, 4, 9, 9]])
    numbers = numbers_of(model, sequences, 3, {"eos_token_id": [9]}, torch.Generator().manual_seed(0)).numbers
    assert np.isnan(numbers).tolist() == [[False, True, True], [False, False, True]]
