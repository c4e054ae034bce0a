"""The best continuations of beams: among the candidates are those of a search through all scores."""

from __future__ import annotations

import pytest
import torch

from hf_fastattn.kernels.sampling import continuations_reference
from hf_fastattn.kernels.sampling.continuations import MOST_KEPT, continuations


def assert_best(found: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor, so_far: torch.Tensor, kept: int) -> None:
    scores, tokens = found
    wanted = logits.double().log_softmax(-1) + so_far.double()[:, None]
    # Every candidate has the score of its token, and none comes twice.
    there = scores > -torch.inf
    assert torch.allclose(scores[there].double(), wanted.gather(1, tokens)[there], rtol=2e-6, atol=2e-5)
    for row, valid in zip(tokens, there, strict=True):
        assert len(row[valid].unique()) == int(valid.sum())
    best, places = torch.topk(scores, kept)
    want = torch.topk(wanted, kept)
    assert torch.allclose(best.double(), want.values, rtol=2e-6, atol=2e-5)
    if logits.dtype == torch.float32:
        # Without equal logits it is clear which tokens they are.
        assert torch.equal(tokens.gather(1, places), want.indices)


def drawn(rows: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    # Some rows lie between others, as the last column of a prompt's logits does.
    logits = 3 * torch.randn(rows, 2, vocab, generator=generator)
    so_far = -20 * torch.rand(rows, generator=generator)
    return logits.to(device, dtype)[:, 1], so_far.to(device)


CASES = [(5, 4096, 8, torch.float32), (3, 9000, 3, torch.float32), (2, 130, 32, torch.float32), (2, 5003, 8, torch.bfloat16)]


@pytest.mark.parametrize(("rows", "vocab", "kept", "dtype"), CASES)
def test_reference(rows, vocab, kept, dtype):
    logits, so_far = drawn(rows, vocab, dtype, "cpu")
    assert_best(continuations_reference.continuations(logits, so_far, kept), logits, so_far, kept)


@pytest.mark.interpreter
@pytest.mark.parametrize(("rows", "vocab", "kept", "dtype"), CASES)
def test_continuations(rows, vocab, kept, dtype):
    logits, so_far = drawn(rows, vocab, dtype, "cpu")
    assert_best(continuations(logits, so_far, kept), logits, so_far, kept)


@pytest.mark.interpreter
def test_infinite_logits():
    logits, so_far = drawn(2, 5000, torch.float32, "cpu")
    logits[0, 10:] = -torch.inf
    logits[1, ::2] = -torch.inf
    scores, tokens = continuations(logits, so_far, 8)
    best, places = torch.topk(scores, 8)
    want = torch.topk(logits.log_softmax(-1) + so_far[:, None], 8)
    assert torch.allclose(best, want.values, atol=1e-5) and torch.equal(tokens.gather(1, places), want.indices)


@pytest.mark.interpreter
def test_what_does_not_fit_is_refused():
    logits, so_far = drawn(2, 300, torch.float32, "cpu")
    for kept in (0, MOST_KEPT + 1):
        with pytest.raises(ValueError, match="kept"):
            continuations(logits, so_far, kept)
    with pytest.raises(ValueError, match="so_far"):
        continuations(logits, so_far[:1], 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [128, 4097, 32_000, 152_064, 262_144])
def test_sweep(vocab, dtype):
    for rows, kept in ((1, 4), (16, 8), (60, MOST_KEPT)):
        logits, so_far = drawn(rows, vocab, dtype, "cuda")
        assert_best(continuations(logits, so_far, kept), logits, so_far, kept)
