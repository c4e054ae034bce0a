"""The `hf-fastattn` command finds its commands, of one word and of two, and hands the rest of the line on."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from hf_fastattn import cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_shows_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: hf-fastattn {command} ")
    assert "--output" in shown or command == "demo"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_options_and_status_pass_through(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[command][0]), "main", lambda argv: given.append(argv) or 7)
    assert cli.main([*command.split(), "--one", "2", "three"]) == 7
    assert given == [["--one", "2", "three"]]


@pytest.mark.parametrize("words", [[], ["bench"], ["eval", "nothing"], ["attention"]])
def test_unknown_commands_list_the_known(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert " ".join(words) in shown and ("bench attention" in shown or not words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs its full sizes on a GPU")
def test_bench_attention_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--kind", "append", "--output", str(tmp_path)]
    assert cli.main(["bench", "attention", *options]) == 0
    assert "### append" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"attention.md", "attention.json"}
