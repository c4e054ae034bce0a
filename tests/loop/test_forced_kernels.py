"""Forced tokens by the kernels that a recorded step launches, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList

from hf_fastattn.eval.accuracy.reexecuted import reexecuted_loop
from hf_fastattn.loop.forced_tokens import ForcedTokens
from tests.loop.test_decode_loop import assert_looped, run
from tests.tools.models import VOCAB, pair_with_graphs

pytestmark = pytest.mark.interpreter


def test_as_in_transformers_loop() -> None:
    stock, model = pair_with_graphs("llama", {"backend": "triton"})
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(3, VOCAB, (3, 4), generator=torch.Generator().manual_seed(2))
    tokens[1, 1] = 2
    found = []
    with reexecuted_loop():
        for one in (stock, model):
            forced = ForcedTokens(tokens, [2])
            kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "eos_token_id": 2}
            found.append((run(one, 4, logits_processor=LogitsProcessorList([forced]), **kwargs), forced))
        assert_looped(model)
    (want, theirs), (got, ours) = found
    assert torch.equal(got, want) and torch.equal(ours.choices, theirs.choices)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-3, rtol=0, equal_nan=True)
