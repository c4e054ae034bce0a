"""The benchmark of a model that is spread over ranks: two processes with gloo, parts of random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest

from hf_fastattn.eval import speed
from hf_fastattn.eval.choices import SHAPES
from hf_fastattn.eval.rank_speed.samples import steady
from hf_fastattn.eval.rank_speed.table import markdown
from hf_fastattn.eval.shapes import shape_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--tp", "--batch", "1", "3", "--prompt", "9", "--new", "3", "--pairs", "1")


def run(output: Path, *given: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    words = [*command, str(ROOT / "tests" / "eval" / "tiny_ranks.py"), *SMALL, *given, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    options: dict[str, Any] = {"text": True, "cwd": ROOT, "env": environment}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options) as started:
        try:
            _, errors = started.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            # It ends the processes that it has started then; killed, it would leave them.
            started.terminate()
            started.wait(30)
            raise
    name = "ranks-samples" if "--samples" in given else "ranks"
    assert (output / f"{name}.json").exists(), errors[-3000:]
    return started.returncode, json.loads((output / f"{name}.json").read_text()), (output / f"{name}.md").read_text()


@pytest.mark.parametrize("shape", ["llama-3-8b", "qwen3-30b-a3b"])
def test_shapes(tmp_path: Path, shape: str) -> None:
    status, record, table = run(tmp_path, "--shape", shape)
    assert status == 0 and not record["failed"] and not record["sums"]
    assert [row["name"] for row in record["cases"]] == ["1 x 9", "3 x 9"]
    for row in record["cases"]:
        assert not row["problems"] and f"| {row['name']} |" in table
        # The difference of two calls of a few milliseconds may come out below zero.
        assert all(row[way]["first_ms"] > 0 and isfinite(row[way]["token_ms"]) for way in ("ours", "one", "stock"))


def test_samples(tmp_path: Path) -> None:
    status, record, table = run(tmp_path, "--shape", "llama-3-8b", "--layers", "1", "--samples", "2", "3")
    assert status == 0 and not record["failed"] and record["settings"]["layers"] == 1
    assert [(row["prompts"], row["samples"]) for row in record["cases"]] == [(1, 2), (3, 3)]
    for row in record["cases"]:
        rows = row["prompts"] * row["samples"]
        assert row["shared"]["computed"] == 9 * row["prompts"] and row["alone"]["computed"] == 9 * rows
        assert f"| {row['prompts']} x 9, {row['samples']} samples each |" in table
        assert isfinite(row["token_ratio"]) and row["first_ratio"] > 0


def test_what_comes_before_steady_steps_is_left_out() -> None:
    """A step that is recorded first, and a pause of the machine amid the steps."""
    came = [0.0, 5.0, *(5.0 + 0.01 * number for number in range(1, 30)), *(9.0 + 0.01 * number for number in range(10))]
    assert steady(came, 1.0) == pytest.approx(0.01)
    assert steady(came[:9], 1.0) == 1.0


def test_a_red_case_and_a_failed_one_are_named(tmp_path: Path) -> None:
    figures = {"first_ms": 1.0, "token_ms": 2.5, "timings": []}
    case = {"name": "1 x 9", "limit_ms": None, "ours": figures, "one": None, "stock": None, "problems": ["fell back"]}
    sums = [{"rows": 1, "bytes": 128, "group": 18.4, "group_norm": 7.8, "peers_norm": None, "one_shot": None}]
    settings = {"model": "m", "dtype": "float32", "ranks": 4, "new": 3, "stock_new": 3, "pairs": 1}
    record = {
        "command": "c", "environment": {"device": "d"}, "settings": settings, "peers": "p", "cases": [case], "sums": sums,
        "failed": [{"case": "stock 1 x 9", "error": "no"}],
    }  # fmt: skip
    table = markdown(record)
    assert "| 1 x 9 | 2.50 |  | 1.00 |  |  |  |  |" in table and "| 1 | 128 | 18.40 | 7.80 |  |  |" in table
    assert "**RED** 1 x 9: fell back" in table and "**stock 1 x 9 failed**: no" in table


def test_without_processes_it_says_how(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        speed.main(["--tp"])
    assert "torchrun --nproc-per-node N" in capsys.readouterr().err


def test_other_measurements_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(SystemExit):
        speed.main(["--tp", "--kind", "samples"])
    assert "--kind is not measured over ranks" in capsys.readouterr().err


def test_the_size_of_a_model_larger_than_a_gpu() -> None:
    config = shape_config("llama-3-70b")
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (80, 8192, 128)
    assert shape_config("llama-3-70b", 2).num_hidden_layers == 2 and SHAPES["llama-3-70b"]["num_hidden_layers"] == 80
