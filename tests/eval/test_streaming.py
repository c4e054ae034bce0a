"""`hf-fastattn eval streaming` on the shipped checkpoint: a short stream, few places, some tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_fastattn import Streaming
from hf_fastattn.eval import streaming
from hf_fastattn.eval.models import SHIPPED, load

SHORT = ["--tokens", "700", "--window", "64", "--sinks", "4", "--places", "6", "--new", "8", "--quiet", "--threads", "1"]


def test_a_row_that_is_not_full_is_scored_as_stock_scores_it() -> None:
    """Before anything is forgotten, streaming, encoding again and stock are the same."""
    model, tokenizer = load(str(SHIPPED), torch.float32, "cpu")
    tokens = torch.tensor(tokenizer.encode("The doctor was a careful man. " * 12))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    want = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").double().numpy()
    whole = Streaming(4, 128)
    got = streaming.streamed_losses(model, tokens, whole, True, "all")
    np.testing.assert_allclose(got, want, atol=1e-4)
    places = [5, 30, len(tokens) - 2]
    again = streaming.losses_encoded_again(model, tokens, whole.layout(16), places, 2, True)
    np.testing.assert_allclose(again, want[places], atol=1e-4)


def test_too_few_tokens_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        streaming.main([*SHORT[2:], "--tokens", "50"])
    assert "50 tokens are no more than a row keeps (96)" in capsys.readouterr().err
