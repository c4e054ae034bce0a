"""Each planted fault turns both evaluations red, quietly, and leaves nothing behind; without one they stay green."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_fastattn
from hf_fastattn.eval import fault_table, models
from hf_fastattn.eval.accuracy import faults, texts, windows
from hf_fastattn.eval.accuracy.feed import Schedule, in_pieces
from hf_fastattn.eval.choices import KV_DTYPES
from tests.eval.reduced import PLAIN, SHARED, SMALL

LAYERS = 3
OPTIONS = {"perplexity": [], "parity": ["--new", "6"]}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("fault", faults.FAULTS)
def test_faults_are_caught(fault: str, name: str) -> None:
    window = ["--window", "48"] if fault == "window" else []
    record = fault_table.evaluate(name, [*SMALL, *OPTIONS[name], *SHARED, *window, "--inject", fault])
    assert record["verdict"] == "red" and record["planted"] > 0
    alarms = [check for check in record["checks"] if check["alarms"]]
    # Quiet faults: numbers that are wrong, not NaN, and on the paged path.
    assert alarms and all(isinstance(check["value"], float) and check["limit"] > 0 for check in alarms)
    assert max(check["value"] / check["limit"] for check in alarms) > 100


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", range(2))
def test_no_alarm_without_a_fault(seed: int, name: str) -> None:
    window = ["--window", "48"] if seed == 1 else []
    record = fault_table.evaluate(name, [*SMALL, *OPTIONS[name], *SHARED, *window, "--seed", str(seed)])
    assert record["verdict"] == "green" and record["planted"] == 0


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_scales_of_keys_that_are_off_are_caught(kv_dtype: str, name: str) -> None:
    """And 8-bit keys and values by themselves raise no alarm, since stock rounds alike."""
    options = [*SMALL, *OPTIONS[name], *PLAIN, "--kv-dtype", kv_dtype]
    record = fault_table.evaluate(name, options)
    assert record["verdict"] == "green" and f"kv_dtype={kv_dtype}" in record["variants"][0]
    record = fault_table.evaluate(name, [*options, "--inject", "kv_scale"])
    assert record["verdict"] == "red" and record["planted"] > 0
    assert max(check["value"] / check["limit"] for check in record["checks"] if check["alarms"]) > 3


def test_eight_bits_in_recorded_steps_and_answers() -> None:
    """In the loop, and beside a trainer's forward, which rounds nothing: stock over a cache that rounds is as far off."""
    options = ["--variant", "backend=reference,loop=on,share=on", "--kv-dtype", "fp8"]
    record = fault_table.evaluate("logprobs", [*SMALL, "--new", "4", "--samples", "2", *options])
    assert record["verdict"] == "green" and "loop=on" in record["variants"][0]
    stock, ours = (row["rms"] for row in record["series"])
    assert stock > 1e-3 and ours == pytest.approx(stock, rel=0.2)


def test_a_fault_of_scales_needs_scales(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fault_table.evaluate("perplexity", [*SMALL, *PLAIN, "--inject", "kv_scale"])
    with pytest.raises(SystemExit):
        fault_table.main(["--faults", "kv_scale"])
    assert capsys.readouterr().err.count("needs 8-bit keys and values; give --kv-dtype") == 2


MIXTURE = ["--model", str(models.MIXTURE)]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("fault", faults.ROUTING_FAULTS)
def test_faults_of_routers_are_caught(fault: str, name: str) -> None:
    record = fault_table.evaluate(name, [*SMALL, *MIXTURE, *OPTIONS[name], *PLAIN, "--inject", fault])
    assert record["verdict"] == "red" and record["planted"] > 0
    alarms = [check for check in record["checks"] if check["alarms"]]
    assert alarms and all(check["limit"] > 0 for check in alarms)
    assert max(check["value"] / check["limit"] for check in alarms) > 100


@pytest.mark.parametrize("name", OPTIONS)
def test_no_alarm_with_experts(name: str) -> None:
    for seed in range(2):
        record = fault_table.evaluate(name, [*SMALL, *MIXTURE, *OPTIONS[name], *SHARED, "--seed", str(seed)])
        assert record["verdict"] == "green" and record["planted"] == 0


@pytest.fixture(scope="module")
def fed() -> Any:
    model, tokenizer = models.load(str(models.SHIPPED), torch.float32, "cpu", window=48)
    chosen = windows.choose(texts.documents(), tokenizer, context=96, stride=32, count=2, seed=0)
    batch = windows.batches(chosen, 2, pad=2)[0]

    def logits() -> torch.Tensor:
        return torch.cat([piece.logits for piece in in_pieces(model, batch, Schedule(11, 4, 5), keep=24)], 1)

    return model, logits


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_undone_after_the_block(fault: str, fed: Any) -> None:
    model, logits = fed
    with hf_fastattn.patched(model):
        before = logits()
        with faults.planted(model, fault) as planted:
            wrong = logits()
        assert planted.times > 0 and bool(wrong.isfinite().all()) and not torch.allclose(wrong, before, atol=1e-3)
        assert torch.equal(logits(), before)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def test_exchanging_full_pages_in_decode_changes_nothing(fed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the fault `page` involves the last, partial page: whole pages may stand in any order."""
    model, _ = models.load(str(models.SHIPPED), torch.float32, "cpu")
    ids = torch.arange(100, 165)[None]

    def exchanged(plan: Any) -> Any:
        if not plan.is_decode:
            return plan
        pages = [[row[1], row[0], *row[2:]] for row in plan.pages]
        return replace(plan, pages=pages, _indices={})

    with hf_fastattn.patched(model):
        right = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        monkeypatch.setitem(faults._PLAN_FAULTS, "page", exchanged)
        with faults.planted(model, "page") as planted:
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8), right)
        assert planted.times > 0


def test_bad_requests_are_refused(fed: Any, capsys: Any) -> None:
    model, _ = fed
    with pytest.raises(ValueError, match="not patched"), faults.planted(model, "scale"):
        pass
    with hf_fastattn.patched(model):
        with pytest.raises(ValueError, match="unknown"), faults.planted(model, "typo"):
            pass
        with pytest.raises(ValueError, match="has no router whose"), faults.planted(model, "expert"):
            pass
        with pytest.raises(ValueError, match="layer 7 does not exist"), faults.planted(model, "scale", 7):
            pass


def test_table_of_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--context", "64", "--stride", "24", "--windows", "2", "--device", "cpu", "--dtype", "float32"]
    chosen = ["--seeds", "0", "--kv-dtype", "fp8", "--faults", "kv_scale", "--evaluations", *OPTIONS]
    assert fault_table.main([*size, *PLAIN, *chosen, "--output", str(tmp_path), "--quiet"]) == 0
    # What has ended is there for a run that goes on.
    (journal,) = (tmp_path / ".journal").glob("faults-*.jsonl")
    assert len(journal.read_text().splitlines()) == 1 + len(OPTIONS)
    monkeypatch.setattr(fault_table, "evaluate", None)
    assert fault_table.main([*size, *PLAIN, *chosen, "--output", str(tmp_path), "--quiet"]) == 0
    text = (tmp_path / "faults.md").read_text()
    assert "all caught by two evaluations or more" in text and "0 alarms in 0 runs" in text
    assert "| kv_scale | planted in hooks | caught, " in text
