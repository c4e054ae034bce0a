"""How a step chooses, with the kernels as they are: a draw gives the threshold for the processors that come after it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.loop import token_choice
from hf_fastattn.loop.device_state import DeviceState
from hf_fastattn.loop.graph_key import GraphKey
from hf_fastattn.loop.step_processors import Epsilon, Eta, Suppress, Typical

VOCAB, SUPPRESSED = 3001, list(range(0, 3001, 2))


def check(dtype: torch.dtype, params: SamplingParams, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last draw is from Transformers' scores, and gives tokens that these keep."""
    logits = (torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1)) * 3).to(device, dtype)
    state = DeviceState(torch.device(device), 2, 16, [None], VOCAB)
    given = (Suppress(tuple(SUPPRESSED)), Typical(0.8), Epsilon(1e-3), Eta(1e-2))
    state.processors.begin(given, torch.zeros(2, 4, dtype=torch.int64), 8)
    state.params.copy_(params.tensor(device))
    drawn_from: list[torch.Tensor] = []
    choose = token_choice.choose_tokens
    watched = lambda scores, *args, **kwargs: (drawn_from.append(scores), choose(scores, *args, **kwargs))  # noqa: E731
    monkeypatch.setattr(token_choice, "choose_tokens", watched)
    recorded = tuple((type(one), one.sizes()) for one in given)
    token_choice.choose(state, GraphKey(2, True, False, False, processors=recorded), logits)
    scores = SuppressTokensLogitsProcessor(SUPPRESSED, device=device)(None, logits.float())
    for warper in (
        TemperatureLogitsWarper(params.temperature), TopKLogitsWarper(params.top_k or VOCAB), TopPLogitsWarper(params.top_p),
        TypicalLogitsWarper(0.8), EpsilonLogitsWarper(1e-3), EtaLogitsWarper(1e-2, device=device),
    ):  # fmt: skip
        scores = warper(None, scores)
    ours = drawn_from[-1]
    assert len(drawn_from) == 2 and torch.equal(ours > -math.inf, scores > -math.inf)
    torch.testing.assert_close(ours.softmax(-1), scores.softmax(-1), rtol=1e-4, atol=1e-6)
    assert (scores.gather(1, state.tensors(2, False).chosen[:, None]) > -math.inf).all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("dtype", "params"),
    [
        # Of tokens that tie at the edge of top-p Transformers drops some: with top-p, logits that do not tie.
        (torch.float32, SamplingParams(1.5, top_k=300, top_p=0.95)),
        (torch.bfloat16, SamplingParams(1.5, top_k=300)),
        (torch.bfloat16, SamplingParams(0.7)),
    ],
)
def test_in_the_interpreter(dtype: torch.dtype, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    check(dtype, params, "cpu", monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("params", [SamplingParams(1.5, top_k=300, top_p=0.95), SamplingParams(0.7)], ids=str)
def test_on_a_gpu(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    check(torch.float32, params, "cuda", monkeypatch)
