"""How likely chosen tokens were: against fp64, and against Transformers' warpers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.sampling import reference
from hf_fastattn.kernels.sampling.draw import choose_tokens
from hf_fastattn.kernels.sampling.logprobs import token_logprobs
from hf_fastattn.kernels.sampling.params import SamplingParams
from tests.kernels.sampling.test_draw import BF16, FP16, FP32, logits

ROWS = [
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(top_k=5),
    SamplingParams(temperature=2.0, top_p=0.9),
    SamplingParams(min_p=0.05, top_k=900),
]


def check_likeliest(x: Tensor) -> None:
    tokens, out = torch.empty(len(x), dtype=torch.int64, device=x.device), torch.full((len(x),), math.nan, device=x.device)
    choose_tokens(x, tokens)
    token_logprobs(x, tokens, out)
    expected = x.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=2e-6)


def drawn(x: Tensor, params: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[B]`, and how likely they were."""
    tokens, out = torch.empty(len(x), dtype=torch.int64, device=x.device), torch.full((len(x),), math.nan, device=x.device)
    one, thresholds = torch.ones(1, dtype=torch.int64, device=x.device), torch.full_like(out, math.nan)
    choose_tokens(x, tokens, params=params, seed=one, rows=numbers, step=one, thresholds=thresholds)
    token_logprobs(x, tokens, out, params=params, thresholds=thresholds)
    return tokens, out


def check_draws(x: Tensor) -> None:
    """Rows with parameters of their own, and one by one with these for all."""
    count, device = len(ROWS), x.device
    numbers = torch.arange(count, dtype=torch.int32, device=device)
    own = torch.stack([params.tensor(device) for params in ROWS])
    tokens, out = drawn(x[:count], own, numbers)
    expected = reference.token_logprobs(x[:count], tokens, own)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for place in range(count):
        alone = drawn(x[place : place + 1], own[place], numbers[place : place + 1])
        assert alone[0].item() == tokens[place] and alone[1].item() == out[place]
        kept = reference.probabilities(x[place : place + 1], ROWS[place])[0, tokens[place]]
        torch.testing.assert_close(out[place], kept.log().float(), rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("vocab", [63, 9001])
def test_logprobs(vocab: int, dtype: torch.dtype) -> None:
    x = logits(5, vocab + 5, dtype, "cpu")[:, 3:-2]
    check_likeliest(x)
    check_draws(x)


@pytest.mark.interpreter
def test_scores_that_are_not_finite() -> None:
    x = logits(3, 100, FP32, "cpu")
    x[0, 5:], x[1, ::2] = -math.inf, -math.inf
    check_likeliest(x)
    x[2, 7], out = math.nan, torch.zeros(3)
    token_logprobs(x, torch.tensor([0, 1, 3]), out)
    expected = x[2].nan_to_num(-math.inf).log_softmax(-1)[3]
    torch.testing.assert_close(out[2], expected)
    token_logprobs(x, torch.tensor([50, 0, 7]), out)
    assert out.tolist() == [-math.inf] * 3


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused() -> None:
    x, tokens, out = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    params = SamplingParams().tensor("cpu")
    with pytest.raises(ValueError, match="together"):
        token_logprobs(x, tokens, out, params=params)
    with pytest.raises(ValueError, match="params"):
        token_logprobs(x, tokens, out, params=params.repeat(3, 1), thresholds=out)
    with pytest.raises(ValueError, match="out"):
        token_logprobs(x, tokens, out[:1])
    token_logprobs(x[:0], tokens[:0], out[:0])


def test_reference_with_parameters_by_row() -> None:
    x = logits(len(ROWS), 1003, BF16, "cpu")
    own = torch.tensor([params.values() for params in ROWS], dtype=torch.float64)
    for place, params in enumerate(ROWS):
        row = x[place : place + 1]
        assert torch.equal(reference.kept_tokens(x, own)[place], reference.kept_tokens(row, params)[0])
        assert torch.equal(reference.probabilities(x, own)[place], reference.probabilities(row, params)[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab", "dtype"), [(128_256, BF16), (151_936, FP32), (32_003, FP16)])
def test_sweep_logprobs(vocab: int, dtype: torch.dtype) -> None:
    for rows in (5, 64):
        x = logits(rows, vocab, dtype, "cuda")
        check_likeliest(x)
        check_draws(x)
