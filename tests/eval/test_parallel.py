"""The benchmark of calls that begin alike: every kind runs on a tiny model, and what is computed twice is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_fastattn import cli
from hf_fastattn.eval import parallel
from hf_fastattn.eval.choices import PARALLEL, SHAPES
from hf_fastattn.eval.parallel_calls.prompts import Prompts
from hf_fastattn.eval.parallel_calls.systems import loop_seconds
from hf_fastattn.generation import prefix_call
from hf_fastattn.loop.decode_loop import DecodeLoop
from tests.tools.models import COMMON

TINY = {**COMMON, "model_type": "llama"}


def run(output: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    small = ("--rows", "1", "5", "--length", "150", "--own", "9", "--turns", "3", "--new", "3", "--pairs", "1")
    status = cli.main(["bench", "parallel", "--device", "cpu", *small, *arguments, "--output", str(output)])
    return status, json.loads((output / "parallel.json").read_text()), (output / "parallel.md").read_text()


@pytest.fixture(autouse=True)
def tiny_and_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-3-8b", TINY)
    monkeypatch.setitem(parallel.SLOWER, "cpu", float("inf"))


def test_all_kinds(tmp_path: Path) -> None:
    status, record, table = run(tmp_path)
    assert status == 0 and not record["failed"]
    assert [row["kind"] for row in record["cases"]] == [
        kind for kind in PARALLEL for _ in range(1 if kind == "turns" else 2)
    ]
    for row in record["cases"]:
        assert f"| {row['name']} |" in table
        if row["kind"] != "turns":
            held = row["systems"]
            assert held["shared"]["computed"] <= row["least"] and held["kept"]["computed"] < row["least"]
            assert held["unshared"]["reused"] == 0 and held["unshared"]["computed"] >= row["rows"] * 150


def test_what_is_computed_twice_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_call, "tokens_in_common", lambda *arguments: 0)
    status, record, table = run(tmp_path, "--kind", "questions", "--length", "400", "--layers", "1")
    assert status == 1 and "were computed instead of" in table
    assert record["settings"]["layers"] == 1


def test_heavy_cases_leave_out_who_computes_every_row(tmp_path: Path) -> None:
    status, record, _ = run(tmp_path, "--kind", "samples", "--most", "400")
    assert status == 0
    assert [list(row["systems"]) for row in record["cases"]] == [["stock", "unshared", "shared", "kept"], ["shared", "kept"]]


def test_cases_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, record, _ = run(tmp_path, "--no-stock", "--case", "samples:2x40", "questions:3x60")
    assert status == 0
    assert [(row["kind"], row["rows"], row["length"]) for row in record["cases"]] == [
        ("samples", 2, 40),
        ("questions", 3, 60),
    ]
    for wrong in ("samples", "sample:2x40", "samples:0x40", "samples:2x"):
        with pytest.raises(SystemExit):
            run(tmp_path, "--case", wrong)
        assert "KIND:ROWSxTOKENS" in capsys.readouterr().err


def test_loops_are_timed_and_left_as_they_were() -> None:
    run_before = DecodeLoop.run
    with pytest.raises(KeyError), loop_seconds(torch.device("cuda")) as loops:
        assert DecodeLoop.run is not run_before and loops == []
        raise KeyError
    assert DecodeLoop.run is run_before


def test_without_stock(tmp_path: Path) -> None:
    status, record, _ = run(tmp_path, "--kind", "fours", "turns", "--no-stock")
    assert status == 0
    fours, _, turns = record["cases"]
    assert list(fours["systems"]) == ["unshared", "shared", "kept"] and list(turns["systems"]) == ["shared", "kept"]


def test_rows_of_fours_are_four_samples_of_each_prompt() -> None:
    rows = Prompts("fours", 6, 20, 9, 100).tokens(0)
    assert len(rows) == 6 and all(len(row) == 20 for row in rows)
    assert len({tuple(row.tolist()) for row in rows[:4]}) == len({tuple(row.tolist()) for row in rows[4:]}) == 1
    assert rows[0].tolist() != rows[4].tolist()


def test_a_case_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "most_to_compute", None)
    status, record, table = run(tmp_path, "--kind", "groups")
    assert status == 1 and len(record["failed"]) == 2 and "failed**: TypeError" in table
