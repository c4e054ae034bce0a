"""What only a GPU shows of beams in the device's loop: nobody waits, and lengths divide scores as PyTorch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fastattn.kernels.sampling.params import SamplingParams
from hf_fastattn.loop.beam_request import BeamRequest
from hf_fastattn.loop.beam_state import BeamShape, BeamState, Length
from hf_fastattn.loop.request import LoopRequest
from tests.loop.test_beams import assert_looped, both, run
from tests.loop.test_decode_loop_gpu import strictly
from tests.tools.models import VOCAB

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("penalty", [1.0, 0.6, 2.0, -1.0])
def test_a_length_divides_as_pytorch_does(penalty: float) -> None:
    powers = tuple(float(count**penalty) for count in range(1, 130))
    request = BeamRequest(
        LoopRequest(False, 129, (), (), 0, SamplingParams(), 0, None), beams=2, kept=4, returned=1, fill=0,
        powers=(1.0, *powers), length_penalty=penalty, early_stopping=False,
    )  # fmt: skip
    ids = torch.ones(2, 3, dtype=torch.int64, device="cuda")
    state = BeamState(BeamShape.of(request, 2, 3), ids.device, 1, 2)
    state.begin(request, ids)
    scores = -50 * torch.rand(10_000, device="cuda")
    for count in (1, 3, 7, 11, 128):
        length = Length(state, torch.tensor([count], device="cuda"))
        assert torch.equal(scores / length**penalty, scores / (count**penalty))


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2}, {"num_beams": 5}])
@pytest.mark.parametrize("early", [False, True, "never"])
def test_the_host_never_waits_for_a_step(
    early: bool | str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, model = both("qwen2_window", "cuda")
    asked = {"early_stopping": early, "eos_token_id": VOCAB - 1, **options}
    want = run(stock, **asked)
    assert torch.equal(run(model, **asked), want)
    strictly(monkeypatch, "_launch", "_take", "_reserve")
    assert torch.equal(run(model, **asked), want)
    assert assert_looped(model).graphs_captured == 0
