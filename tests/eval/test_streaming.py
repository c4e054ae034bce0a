"""`hf-fastattn eval streaming` on the shipped checkpoint: a short stream, few places, some tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_fastattn import Streaming
from hf_fastattn.eval import streaming
from hf_fastattn.eval.models import SHIPPED, load

SHORT = ["--tokens", "700", "--window", "64", "--sinks", "4", "--places", "6", "--new", "8", "--quiet", "--threads", "1"]


def test_the_command(tmp_path: Path) -> None:
    status = streaming.main([*SHORT, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "streaming.json").read_text())
    assert status == (0 if record["series"][0]["ratio"] <= record["limit"] else 1)
    assert record["tokens"] == 700 and record["places"] == 6 and record["capacity"] == 16 + 64 + 16
    assert record["generated"]["pages"] and set(record["generated"]["pages"]) == {6}
    assert record["perplexities"][streaming.STREAMING] < record["perplexities"][streaming.WINDOWING]
    text = (tmp_path / "streaming.md").read_text()
    assert "encoded again" in text and "plain windowing" in text


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
