"""The token of greatest logit of every row, whatever else is in the row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.sampling import reference
from hf_fastattn.kernels.sampling.draw import choose_tokens
from tests.kernels.sampling.test_draw import BF16, FP16, FP32, adversarial, logits


def check_greedy(x: Tensor) -> None:
    wide = torch.full((len(x), 2), -7, device=x.device)
    choose_tokens(x, wide[:, 0])
    assert torch.equal(wide[:, 0], reference.greedy_tokens(x))
    assert (wide[:, 1] == -7).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("vocab", [1, 63, 4096, 9001])
def test_greedy(vocab, dtype):
    x = logits(5, vocab + 5, dtype, "cpu")[:, 3:-2]
    x[1] = 2.0
    x[2] = -math.inf
    x[3] = math.nan
    x[4, ::2] = math.nan
    check_greedy(x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_sweep_greedy(dtype):
    for rows, vocab in ((1, 128_256), (16, 128_256), (64, 32_003), (512, 128_256), (3, 1), (5, 4097)):
        x = logits(rows, vocab, dtype, "cuda").round()
        x[-1] = math.nan
        check_greedy(x)
    check_greedy(adversarial(128_256, dtype, "cuda"))
