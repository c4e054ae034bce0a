"""Generation without end in recorded steps on a GPU, against the plain implementation."""

from __future__ import annotations

import pytest
import torch

import hf_fastattn
from tests.generation.test_streaming import LAYOUT, PAGE, ROPES, STREAM, model_with, streamed_logits
from tests.tools.models import VOCAB, assert_fast

pytestmark = pytest.mark.gpu
# Two logits as near as this may be exchanged: sums are rounded in another order.
TIED = 2e-3


@pytest.mark.parametrize("rope", ROPES)
def test_recorded_steps_are_one_stream(rope):
    model = model_with(rope).cuda()
    torch.manual_seed(5)
    prompt = torch.randint(1, VOCAB, (2, 70), device="cuda")
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE):
        rows = model.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0)
        calls = assert_fast(model)
        assert calls.fast_loops == 1 and calls.graphs_captured >= 1 and not calls.uncaptured
        assert calls.pages_allocated == 2 * LAYOUT.pages
    for row in rows:
        logits = streamed_logits(model, row[:-1], LAYOUT)[69:]
        chosen = logits.gather(1, row[70:, None])[:, 0]
        assert bool((chosen >= logits.amax(1) - TIED).all())


def test_samples_in_recorded_steps_own_what_they_write():
    model = model_with().cuda()
    torch.manual_seed(5)
    prompt = torch.randint(1, VOCAB, (1, 50), device="cuda")
    with hf_fastattn.patched(model, streaming=STREAM, page_size=PAGE):
        rows = model.generate(prompt.repeat(4, 1), max_new_tokens=60, do_sample=False, pad_token_id=0)
        assert assert_fast(model).pages_copied > 0
    assert bool((rows == rows[:1]).all())
