"""Perplexity: the numbers are Transformers' own, pieces cover the text, reports are written, runs resume."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_fastattn
from hf_fastattn.eval import models, perplexity
from hf_fastattn.eval.accuracy import estimates, texts, variants, windows
from hf_fastattn.eval.accuracy.feed import Schedule, in_pieces, whole
from hf_fastattn.eval.accuracy.journal import Journal
from tests.eval.reduced import PLAIN, SMALL


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return models.load(str(models.SHIPPED), torch.float32, "cpu")


@pytest.fixture
def batch(loaded: tuple[Any, Any]) -> windows.WindowBatch:
    chosen = windows.choose(texts.documents(), loaded[1], context=96, stride=32, count=3, seed=1)
    return windows.batches(chosen, 3, pad=2)[0]


def test_losses_are_those_of_transformers(loaded: tuple[Any, Any], batch: windows.WindowBatch) -> None:
    model = loaded[0]
    width = batch.ids.shape[1]
    every = windows.WindowBatch(
        tuple(windows.Window(w.document, w.start, w.ids, len(w.ids) - 1) for w in batch.windows), batch.ids, batch.mask
    )
    ours = perplexity.token_losses(iter([perplexity.Piece("whole", 0, width, whole(model, batch, width))]), every)
    for row, window in zip(ours, batch.windows, strict=True):
        ids = torch.tensor([window.ids])
        assert np.mean(row) == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("patched", [None, False, True])
def test_pieces_give_the_logits_of_one_forward(
    loaded: tuple[Any, Any], batch: windows.WindowBatch, patched: bool | None, generate: bool
) -> None:
    """`patched` is whether rows share pages with copies; None is stock."""
    model, schedule = loaded[0], Schedule(appended=11, piece=4, decode=5)
    want = whole(model, batch, 33)
    if patched is None:
        pieces = list(in_pieces(model, batch, schedule, keep=33, generate=generate))
    else:
        with hf_fastattn.patched(model):
            pieces = list(in_pieces(model, batch, schedule, keep=33, share=patched, generate=generate))
            assert hf_fastattn.report(model).pages_in_use == 0
    assert {piece.phase for piece in pieces} == {"prefill", "append", "decode"}
    assert all(a.last == b.first for a, b in zip(pieces, pieces[1:], strict=False))
    got = torch.cat([piece.logits for piece in pieces], 1)[:, -33:]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_windows_score_every_token_once() -> None:
    for bos in (None, 0):
        cut = windows.cut(0, list(range(100, 350)), context=64, stride=32, bos=bos)
        scored = [token for window in cut for token in window.ids[-window.scored :]]
        assert scored == list(range(100 if bos == 0 else 101, 350))
        assert max(len(window.ids) for window in cut) == 64


def test_texts_are_encoded_once(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_kept", {})
    found, tokenizer = texts.documents()[:3], loaded[1]
    encode, encoded = tokenizer.encode, list[str]()

    def counted(text: str, **options: Any) -> Any:
        encoded.append(text)
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", counted)
    sizes = {"context": 96, "stride": 32, "count": 3, "seed": 1}
    first = windows.choose(found, tokenizer, **sizes)
    assert windows.choose(found, tokenizer, **sizes) == first and encoded == [one.text for one in found]
    # No more is kept than fits, and what is not kept is right all the same.
    monkeypatch.setattr(windows, "_kept", {})
    monkeypatch.setattr(windows, "MOST_KEPT", len(encode(found[0].text, add_special_tokens=False)))
    assert [windows.choose(found, tokenizer, **sizes) for _ in range(2)] == [first] * 2 and len(encoded) == 3 + 3 + 2


def test_resumes_after_half_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("hf_fastattn.eval.reporting.report._pyplot", lambda: None)
    arguments = [*SMALL, "--context", "64", "--windows", "2", "--batch", "1", *PLAIN, "--output", str(tmp_path)]
    assert perplexity.main(arguments) == 0
    first = json.loads((tmp_path / "perplexity.json").read_text())
    (journal,) = (tmp_path / ".journal").iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:100])
    score, scored = perplexity.score_batch, []
    monkeypatch.setattr(perplexity, "score_batch", lambda *a: scored.append(a) or score(*a))
    assert perplexity.main(arguments) == 0
    assert len(scored) == 1
    again = json.loads((tmp_path / "perplexity.json").read_text())
    assert again["series"] == first["series"] and again["batches_resumed"] == 1
    # Another seed is another run.
    scored.clear()
    assert perplexity.main([*arguments, "--seed", "1"]) == 0
    assert len(scored) == 2


def test_off_the_paged_path_is_red(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("hf_fastattn.patches.decoder.forward.why_not_paged", lambda *a: "told to")
    assert perplexity.main([*SMALL, *PLAIN]) == 1
    assert "told to" in capsys.readouterr().out


def test_journal_keeps_floats_exactly(tmp_path: Path) -> None:
    path, value = tmp_path / "a.jsonl", [0.1 + 0.2, 1e-300, math.pi]
    Journal(path, {}).add("key", value)
    assert Journal(path, {})["key"] == value


def test_student_t() -> None:
    table = {(0.95, 5): 2.571, (0.95, 30): 2.042, (0.999, 10): 4.587, (0.999, 25): 3.725}
    for (level, freedom), value in table.items():
        assert estimates.student_t(level, freedom) == pytest.approx(value, rel=0.005)
    assert estimates.student_t(0.95, 0) == math.inf


def test_intervals_cover() -> None:
    """Clusters of unequal size with effects of their own: the 95% interval holds the truth about 95 times in 100."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        documents = np.repeat(np.arange(12), rng.integers(1, 5, 12))
        effects = rng.normal(0, 1, 12)
        values = [rng.normal(3 + effects[document], 1, 20) for document in documents]
        low, high = estimates.Clusters(documents.tolist()).mean(values).interval()
        hits += low <= 3 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_variants(loaded: tuple[Any, Any]) -> None:
    variant = variants.parse("page_size=64,backend=reference,share=on")
    assert dict(variant.options) == {"backend": "reference", "page_size": 64} and variant.share
    assert variants.parse(variant.name) == variant
    defaults = variants.default_variants(loaded[0])
    assert {found.share for found in defaults} == {True, False}
    assert len({dict(found.options).get("page_size") for found in defaults}) == 2
    alone = variants.parse("loop=on,alone=on")
    assert alone.alone and not alone.share and variants.parse(alone.name) == alone
    assert variants.with_format([alone], "fp8") == [variants.parse("kv_dtype=fp8,loop=on,alone=on")]
    # Their steps are what they are for several rows, where there is no GPU.
    assert not any(found.alone for found in defaults)
    for wrong in ("alone=on", "loop=on,share=on,alone=on", "no_such=1", "page_size=17", "page_size", "backend=nothing"):
        with pytest.raises(ValueError):
            variants.parse(wrong)


def test_documents_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert [d.text for d in texts.documents(str(tmp_path / "a.txt"))] == ["some text"]
    assert [d.text for d in texts.documents(str(tmp_path / "b.jsonl"), column="body")] == ["one", "two"]
    with pytest.raises(ValueError, match="no file"):
        texts.documents(str(tmp_path / "c.txt"))
    lines = ["", " = First = \n", " = = Part = = \n", "text\n", " = Second = \n", "more\n"]
    assert list(texts.articles(lines)) == ["".join(lines[:1]), "".join(lines[1:4]), "".join(lines[4:])]


def test_missing_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit) as ended:
        perplexity.main([*SMALL, "--data", "wikitext"])
    assert ended.value.code == 2 and "hf-fastattn[eval]" in capsys.readouterr().err


def test_data_sets_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((name, config, options))
        return [{"text": "a first text"}, {"text": " "}, {"text": "a second"}]

    monkeypatch.setattr(texts, "load_dataset", load)
    assert [d.text for d in texts.documents("c4", limit=5)] == ["a first text", "a second"]
    assert texts.documents("wikitext")[0].text.startswith("a first")
    assert asked == [
        ("allenai/c4", "en", {"split": "validation", "streaming": True}),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "test", "streaming": False}),
    ]


def test_precision_is_lifted_and_put_back(loaded: tuple[Any, Any], batch: windows.WindowBatch) -> None:
    model = loaded[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    with models.in_precision(model, torch.float64):
        exact = whole(model, batch, 1)
        assert exact.dtype == torch.float64
        assert {name: buffer.dtype for name, buffer in model.named_buffers()} == buffers
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert (whole(model, batch, 1).double() - exact).abs().max() < 1e-4
