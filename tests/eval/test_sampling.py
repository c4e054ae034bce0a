"""`eval sampling` on few draws: green in the device's loop, red for a threshold that is off and for rows drawn alike."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fastattn.eval import models, sampling
from tests.tools.reexecuted import reexecuted_loop

FEW = ["--device", "cpu", "--quiet", "--prompts", "2", "--samples", "12", "--new", "5", "--calls", "2", "--length", "9"]
MANY = ["--device", "cpu", "--quiet", "--prompts", "4", "--samples", "32", "--new", "6", "--calls", "2", "--length", "40"]


@pytest.fixture(autouse=True)
def shallow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shipped checkpoint its first layers alone: a distribution that nobody knows will do."""
    load = models.load

    def load_shallow(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
        model, tokenizer = load(name, dtype, device)
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        return model, tokenizer

    monkeypatch.setattr(models, "load", load_shallow)


def run(tmp_path: Path, *options: str) -> tuple[int, dict]:
    status = sampling.main([*options, "--output", str(tmp_path)])
    return status, json.loads((tmp_path / "sampling.json").read_text())


def test_draws_in_the_devices_loop_are_stocks(tmp_path: Path) -> None:
    names = ["top-p", "together", "ends"]
    with reexecuted_loop():
        status, record = run(tmp_path, *FEW, "--case", *names)
    assert status == 0 and record["verdict"] == "green" and record["path"] == "the device's loop"
    assert [case["name"] for case in record["cases"]] == names
    tests = [test for case in record["cases"] for test in case["tests"]]
    assert len(tests) >= 7 * len(names) and all(test["corrected"] >= test["p"] for test in tests)
    # Rows leave the batch, and those that stay are tested by themselves.
    assert record["cases"][-1]["ended"] > 0.2 and len(record["cases"][-1]["tests"]) == 9


@pytest.mark.parametrize("case", ["temperature", "top-k", "top-p", "min-p", "penalty"])
def test_a_threshold_that_is_off_is_seen(case: str, tmp_path: Path) -> None:
    # Whoever draws.
    looped = case in ("top-k", "min-p")
    with reexecuted_loop() if looped else nullcontext():
        status, record = run(tmp_path, *MANY, "--case", case, "--inject", "threshold")
    assert status == 1 and record["verdict"] == "red" and bool(record["off_loop"]) != looped
    alarmed = [test["name"] for test in record["cases"][0]["tests"] if test["alarms"]]
    never_drawn = record["cases"][0]["impossible_share"] > sampling.IMPOSSIBLE
    expected = {"as stock's distribution", "the least likely tokens", "tokens that were there before"}
    assert expected & set(alarmed) or never_drawn


def test_samples_that_are_drawn_alike_are_seen(tmp_path: Path) -> None:
    with reexecuted_loop():
        status, record = run(tmp_path, *FEW, "--case", "plain", "--inject", "twins")
    alarmed = [test["name"] for test in record["cases"][0]["tests"] if test["alarms"]]
    assert status == 1 and "samples of a prompt" in alarmed


def test_another_loop_is_named(tmp_path: Path) -> None:
    status, record = run(tmp_path, *FEW, "--case", "plain")
    assert status == 0 and record["path"] == "Transformers' loop" and record["off_loop"] == ["plain"]
    assert "the model is on cpu" in (tmp_path / "sampling.md").read_text()
