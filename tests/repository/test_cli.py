"""The `hf-fastattn` command: answers at once, hands options on to its commands, and says in one line what is wrong."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch

import hf_fastattn
from hf_fastattn import cli
from hf_fastattn.eval import models
from hf_fastattn.eval.arguments import COMMANDS
from tests.tools.fresh import ROOT, fresh

GIVEN = {name: ["--seeds", "2"] if name == "eval faults" else ["--device", "cpu"] for name in COMMANDS}
# What is handed on, and what has no device.
GIVEN |= {"lm-eval": ["--tasks", "hellaswag"], "report": ["a folder"]}
GIVEN |= {f"bench {name}": ["--rounds", "2"] for name in ("attention", "eight-bits", "experts")}
NO_FOLDER = ("demo", "warmup", "serve", "lm-eval", "report")
NOT_FOUND = models.RepositoryNotFoundError("404", response=mock.MagicMock())
WRONG = [
    (["attention"], "argument COMMAND: invalid choice: 'attention'", "bench"),
    (["eval", "nothing"], "argument COMMAND: invalid choice: 'nothing'", "perplexity"),
    (["eval", "parity", "--modle", "x"], "unrecognized arguments: --modle", ""),
    (["eval", "perplexity", "--model", "./nowhere"], "argument --model: there is no folder './nowhere'", "hub id"),
    (["eval", "faults", "--model", "/a/b/nowhere"], "argument --model: there is no folder '/a/b/nowhere'", "hub id"),
    (["bench", "generate", "--model", "../no\nwhere"], "argument --model: there is no folder", "hub id"),
    (["demo", "./nowhere"], "argument model: there is no folder './nowhere'", "hub id"),
    (["eval", "parity", "--data", "./nofile"], "argument --data: there is no file './nofile'", ""),
    (["eval", "parity", "--data", "nofile.jsonl"], "argument --data: there is no file 'nofile.jsonl'", ""),
    (["bench", "generate", "--pairs", "0"], "argument --pairs: must be at least 1, got 0", ""),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: hf-fastattn {command} ")
    assert "--output" in shown or command in ("demo", "warmup", "serve", "lm-eval")


@pytest.mark.parametrize("command", COMMANDS)
def test_options_and_status_pass_through(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(importlib.import_module(COMMANDS[command].module), "main", lambda argv: given.append(argv) or 7)
    assert cli.main([*command.split(), *GIVEN[command]]) == 7
    assert given == [GIVEN[command]]


@pytest.mark.parametrize(
    ("words", "known"), [([], ["demo", "eval", "bench"]), (["eval"], ["perplexity", "parity", "faults"])]
)
def test_a_command_without_words_lists_what_there_is(
    words: list[str], known: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and all(f"\n    {name}" in shown for name in known)


@pytest.mark.parametrize(("words", "message", "hint"), WRONG)
def test_a_mistake_is_one_line(words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.count("\n") == 1 and message in shown and hint in shown


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in NO_FOLDER])
def test_an_output_that_cannot_be_made_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--output", str(tmp_path / "file" / "folder")])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.count("\n") == 1
    assert shown.startswith(f"hf-fastattn {command}: error: argument --output: folder ")


@pytest.mark.parametrize("command", ["demo", "eval perplexity", "eval faults", "bench generate"])
def test_a_model_that_cannot_be_loaded_is_one_line(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    option = [] if command == "demo" else ["--model"]
    named = "model" if command == "demo" else "--model"
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), *option, str(tmp_path)])
    shown = capfd.readouterr().err
    assert ended.value.code == 2 and shown.count("\n") == 1
    assert shown.startswith(f"hf-fastattn {command}: error: argument {named}: '{tmp_path}' cannot be loaded: ")


@pytest.mark.parametrize("error", [models.HTTPError("no network"), NOT_FOUND], ids=["no network", "not found"])
def test_the_hub_is_asked_once(error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "get_hf_file_metadata", mock.Mock(side_effect=error))
    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "perplexity", "--model", "nowhere"])
    shown = capfd.readouterr().err
    assert ended.value.code == 2 and shown.count("\n") == 1
    assert "argument --model: 'nowhere' cannot be loaded: it is no folder, and " in shown


def test_data_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "perplexity", "--data", "nofile"])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.count("\n") == 1 and "argument --data: data set 'nofile'" in shown


def test_answers_come_before_the_heavy_imports() -> None:
    answered = [["--help"], ["--version"], [], ["eval"], ["eval", "nothing"], ["bench", "generate", "--help"]]
    code = f"""
import io, sys, hf_fastattn
from contextlib import redirect_stderr, redirect_stdout, suppress
from hf_fastattn import cli
for words in {answered!r}:
    with suppress(SystemExit), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli.main(words)
print(*sorted({{"torch", "transformers", "numpy", "triton"}} & sys.modules.keys()))
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.strip() == "", shown


def test_help_takes_no_time() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        shown = subprocess.run([sys.executable, "-m", "hf_fastattn", "--help"], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0 and shown.stdout.startswith("usage: hf-fastattn ")
        return time.perf_counter() - start

    # The quickest of several: the machine may be busy. To import PyTorch alone takes longer than this.
    assert min(seconds() for _ in range(5)) < 0.5


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hf_fastattn.version.__version__"}
    shown = subprocess.run([sys.executable, "-m", "hf_fastattn", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout == f"hf-fastattn {hf_fastattn.__version__}\n"


def test_public_names_are_there_when_asked_for() -> None:
    code = """
import json, hf_fastattn
listed = dir(hf_fastattn)
from hf_fastattn import *
found = {name: globals()[name].__module__ for name in hf_fastattn.__all__}
assert all(getattr(hf_fastattn, name) is globals()[name] for name in found)
print(json.dumps([listed, found]))
"""
    listed, found = json.loads(fresh(code))
    assert {*hf_fastattn.__all__, "__version__", "interface", "kernels", "patches", "eval"} <= set(listed)
    assert found == hf_fastattn._DEFINED_IN


def test_report_is_the_function_whoever_imports_its_file() -> None:
    code = """
import hf_fastattn
import hf_fastattn.report
from hf_fastattn.report import report
import hf_fastattn.patching
print(hf_fastattn.report is report)
"""
    assert fresh(code) == "True"


def test_modules_are_reached_as_attributes() -> None:
    code = "import hf_fastattn as h; print(h.interface.counters.fallbacks, h.patching.patch is h.patch, h.kernels.__name__)"
    assert fresh(code) == "Counter() True hf_fastattn.kernels"
    with pytest.raises(AttributeError, match="module 'hf_fastattn' has no attribute 'pach'"):
        hf_fastattn.pach  # noqa: B018


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs its full sizes on a GPU")
def test_bench_attention_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--kind", "append", "--output", str(tmp_path)]
    assert cli.main(["bench", "attention", *options]) == 0
    assert "### append" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"attention.md", "attention.json"}
