"""Repetition penalty and suppressed end of sequence against Transformers' own processors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.sampling import reference
from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.kernels.sampling.penalty import process_logits

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PROMPT = 5
# Dividing by the penalty, and multiplying by its reciprocal: they differ in the last bit.
LAST_BIT = 2.5e-7


def inputs(rows: int, vocab: int, step: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Logits, `input_ids` of a prompt and `step` new tokens, what they have seen, and ids of end of sequence."""
    generator = torch.Generator(device).manual_seed(vocab + step)
    x = (torch.randn(rows, vocab, generator=generator, device=device) * 3).to(dtype)
    x[:, 0], x[:, 1] = 0.0, -math.inf
    ids = torch.randint(0, vocab, (rows, PROMPT + step), generator=generator, device=device)
    ids[:, :2] = torch.tensor([0, 1], device=device)
    seen = torch.zeros(rows, vocab, dtype=torch.uint8, device=device).scatter_(1, ids, 1)
    return x, ids, seen, [2, vocab - 1]


def transformers_scores(x: Tensor, ids: Tensor, params: SamplingParams, eos: list[int]) -> Tensor:
    from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

    x = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, x.float())
    return MinNewTokensLengthLogitsProcessor(PROMPT, params.min_new_tokens, eos, x.device)(ids, x)


def check(rows: int, vocab: int, dtype: torch.dtype, device: str, penalty: float, step: int, min_new: int) -> None:
    x, _, seen, eos = inputs(rows, vocab, step, dtype, device)
    params = SamplingParams(repetition_penalty=penalty, min_new_tokens=min_new)
    ids, now = torch.tensor(eos, device=device), torch.tensor([step], dtype=torch.int32, device=device)
    untouched = x.clone()
    got = process_logits(x, params.tensor(device), seen=seen, eos=ids, step=now)
    assert got.dtype == FP32 and torch.equal(x, untouched)
    assert torch.equal(got, reference.process_logits(x, params, seen, eos, step))
    alone = process_logits(x, params.tensor(device), seen=seen)
    assert torch.equal(alone, reference.process_logits(x, params, seen, eos, min_new))
    wide = torch.empty_like(x, dtype=FP32)
    assert process_logits(x, params.tensor(device), eos=ids, step=now, out=wide) is wide
    want = reference.process_logits(x, params, None, eos, step)
    assert torch.equal(wide, want)
    assert process_logits(x, params.tensor(device), eos=ids, step=now) is x
    assert torch.equal(x.float(), want)


@pytest.mark.parametrize("step", [0, 3])
def test_reference_is_transformers(step):
    x, ids, seen, eos = inputs(3, 50, step, BF16, "cpu")
    for penalty in (2.0, 0.5, 1.3):
        params = SamplingParams(repetition_penalty=penalty, min_new_tokens=2)
        got, want = reference.process_logits(x, params, seen, eos, step), transformers_scores(x, ids, params, eos)
        # Powers of two divide exactly.
        torch.testing.assert_close(got, want, rtol=0 if penalty != 1.3 else LAST_BIT, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("vocab", "step"), [(5000, 0), (63, 3), (2048, 1)])
def test_processed(vocab, step, dtype):
    check(3, vocab, dtype, "cpu", 1.3, step, 2)


@pytest.mark.interpreter
def test_ids_outside_of_the_vocabulary_are_ignored():
    params, step = SamplingParams(min_new_tokens=2).tensor("cpu"), torch.zeros(1, dtype=torch.int32)
    wide = torch.zeros(2, 12)
    process_logits(wide[:, 2:10], params, eos=torch.tensor([-1, 8, 3]), step=step)
    assert (wide == -math.inf).sum() == 2 and (wide[:, 5] == -math.inf).all()


def test_the_reference_ignores_them_as_transformers_does():
    x, ids, seen, eos = inputs(3, 50, 0, BF16, "cpu")
    params = SamplingParams(repetition_penalty=2.0, min_new_tokens=2)
    eos = [*eos, 50, 128_001]
    assert torch.equal(reference.process_logits(x, params, seen, eos, 0), transformers_scores(x, ids, params, eos))


@pytest.mark.interpreter
def test_nothing_to_do():
    params = SamplingParams(repetition_penalty=2.0).tensor("cpu")
    for x in (torch.ones(2, 8), torch.ones(0, 8)):
        assert process_logits(x, params) is x and (x == 1).all()


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    x, params = torch.zeros(2, 8), SamplingParams().tensor("cpu")
    with pytest.raises(ValueError, match="logits"):
        process_logits(x.T, params)
    with pytest.raises(ValueError, match="params"):
        process_logits(x, params[:3])
    with pytest.raises(ValueError, match="seen"):
        process_logits(x, params, seen=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="together"):
        process_logits(x, params, eos=torch.tensor([1]))
    with pytest.raises(ValueError, match="step"):
        process_logits(x, params, eos=torch.tensor([1]), step=torch.zeros(1))
    with pytest.raises(ValueError, match="out"):
        process_logits(x.bfloat16(), params, seen=torch.zeros(2, 8, dtype=torch.uint8), out=x.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_sweep(dtype):
    for rows, vocab in ((1, 128_256), (16, 128_256), (64, 32_003)):
        for step in (0, 5):
            check(rows, vocab, dtype, "cuda", 1.3, step, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", [1.1, 1.3, 0.7])
def test_scores_are_those_of_transformers(penalty):
    x, ids, seen, eos = inputs(16, 128_256, 4, BF16, "cuda")
    params = SamplingParams(repetition_penalty=penalty, min_new_tokens=8)
    step = torch.tensor([4], device="cuda")
    got = process_logits(x, params.tensor("cuda"), seen=seen, eos=torch.tensor(eos, device="cuda"), step=step)
    torch.testing.assert_close(got, transformers_scores(x, ids, params, eos), rtol=LAST_BIT, atol=0)
