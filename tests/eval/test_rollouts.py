"""The benchmark of rollouts: every state runs on a tiny model, and what falls back or computes prompts twice is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_fastattn import cli
from hf_fastattn.eval import rollouts
from hf_fastattn.eval.choices import ROLLOUTS, SHAPES
from tests.tools.models import COMMON

TINY = {**COMMON, "model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 2}


def run(output: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    small = ("--prompts", "2", "--samples", "3", "--length", "12", "--new", "3", "--stock-new", "2", "--pairs", "1")
    status = cli.main(["bench", "rollouts", "--device", "cpu", *small, *arguments, "--output", str(output)])
    return status, json.loads((output / "rollouts.json").read_text()), (output / "rollouts.md").read_text()


@pytest.fixture(autouse=True)
def tiny_and_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "qwen3-0.6b", TINY)
    monkeypatch.setitem(rollouts.SLOWER, "cuda", float("inf"))


def test_all_states(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    status, record, table = run(tmp_path)
    assert status == 0 and not record["failed"]
    assert [row["state"] for row in record["states"]] == list(ROLLOUTS)
    assert all("each prompt computed once" in row["path"] for row in record["states"])
    assert all(f"| {state} |" in table for state in ROLLOUTS)


def test_what_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rollouts.SLOWER, "cuda", 1.03)
    assert rollouts.slower([1.02, 1.02], [1.0, 1.0]) == [] and rollouts.slower([0.5, 1.04], [1.0, 1.0]) == ["a token"]
    assert rollouts.slower([1.04, 1.04], [1.0, -0.1]) == ["first token"]
    # No time is too long here, whatever the difference of two calls of a millisecond comes out as.
    monkeypatch.setitem(rollouts.SLOWER, "cuda", float("inf"))
    assert rollouts.slower([9.0, 9.0], [1.0, -0.1]) == []


def test_what_falls_back_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts.hf_fastattn, "patch", lambda model: _falling(model))
    status, record, table = run(tmp_path, "--state", "bf16+train")
    assert status == 1 and "another path" in record["states"][0]["wrong"] and "**RED** bf16+train" in table


def _falling(model: Any) -> Any:
    from hf_fastattn.patching import patch

    patch(model).model.layers[0].self_attn.forward = lambda *args, **kwargs: type(model.model.layers[0].self_attn).forward(
        model.model.layers[0].self_attn, *args, **kwargs
    )
    return model


def test_a_state_that_fails_is_named(tmp_path: Path) -> None:
    status, record, table = run(tmp_path, "--state", "bf16+nonsense", "bf16+train")
    assert status == 1 and len(record["states"]) == 1 and "unknown words" in record["failed"][0]["error"]
    assert "**bf16+nonsense failed**" in table
