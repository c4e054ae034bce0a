"""Typical sampling: the reference is what Transformers does, and the kernel keeps what the reference keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_fastattn.kernels.sampling import reference, typical

# Where sums of the kernel and of the reference may differ: masses this close to a token's share of it.
EDGE = 1e-5
MASSES = (1e-6, 0.2, 0.9, 0.999)


def scores(rows: int, vocab: int, device: str = "cpu", factor: float = 3.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(vocab)
    return torch.randn(rows, vocab, generator=generator, device=device) * factor


def filtered(rows: int, vocab: int, device: str = "cpu") -> Tensor:
    """Rows as filters leave them, flat ones, certain ones, equal ones, and one of the least numbers."""
    x = scores(rows + 5, vocab, device)
    x[0, 7:] = -math.inf
    x[1] = 2.5
    x[2, vocab // 2] = 1000.0
    x[3] = x[3].round()
    x[4, ::2] = torch.finfo(torch.float32).min
    x[5:] = x[5:].masked_fill(x[5:] < x[5:].topk(min(vocab, 50)).values[:, -1:], -math.inf)
    return x


def check(x: Tensor, mass: float, ties: int = 0) -> None:
    """What is kept is what the reference keeps for a mass that is a little smaller or greater; all else is as it was.

    Args:
        ties: tokens a row, among many, that may be exchanged: their distance from the entropy is the same but for rounding.
    """
    wide = torch.full((len(x), x.shape[1] + 3), math.nan, device=x.device)
    wide[:, : x.shape[1]] = x
    share = torch.tensor([mass], device=x.device)
    out = typical.typical_scores(wide[:, : x.shape[1]], share)
    kept = out > -math.inf
    assert torch.equal(out[kept], x[kept]) and kept.any(-1).all()
    least, most = (reference.typical_scores(x, share + shift) > -math.inf for shift in (-EDGE, EDGE))
    wrong = (least & ~kept) | (kept & ~most)
    assert (wrong.sum(-1) <= ties).all(), (mass, wrong.sum(-1).tolist(), kept.sum(-1).tolist(), least.sum(-1).tolist())


@pytest.mark.parametrize("mass", MASSES)
def test_reference_is_transformers(mass: float) -> None:
    from transformers import TypicalLogitsWarper

    x = torch.cat((scores(4, 1003), filtered(3, 1003)))
    want = TypicalLogitsWarper(mass)(None, x)
    assert torch.equal(reference.typical_scores(x, torch.tensor([mass])), want)


@pytest.mark.interpreter
@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("vocab", [7, 1000, 4001])
def test_kept(vocab: int, mass: float) -> None:
    check(filtered(2, vocab) if vocab > 7 else scores(2, vocab), mass)


@pytest.mark.interpreter
def test_rows_of_more_finite_scores_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typical, "SLOTS", 256)
    monkeypatch.setattr(typical, "TILE", 512)
    for mass in MASSES[1:3]:
        check(scores(3, 1003), mass)


@pytest.mark.interpreter
def test_rows_without_a_finite_score() -> None:
    x = torch.full((2, 40), -math.inf)
    x[1, 3:5] = math.nan
    assert torch.equal(typical.typical_scores(x, torch.tensor([0.5])), torch.full((2, 40), -math.inf))


@pytest.mark.gpu
@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("vocab", [1000, 32_000, 151_936])
def test_kept_on_gpu(vocab: int, mass: float) -> None:
    check(filtered(64, vocab, "cuda"), mass, ties=4)
    check(scores(9, vocab, "cuda", factor=0.5), mass, ties=4)


def test_arguments() -> None:
    good = torch.zeros(2, 3)
    for x, mass in ((good[0], good[0, :1]), (good.half(), good[0, :1]), (good, good[0])):
        with pytest.raises(ValueError, match="must be"):
            typical.typical_scores(x, mass)
