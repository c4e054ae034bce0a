"""Evaluations under `accelerate launch`: the figures of two processes are those of one, to the bit."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_fastattn.eval.accuracy.journal import Journal
from hf_fastattn.eval.accuracy.processes import measured, processes
from tests.eval.reduced import PLAIN, SMALL
from tests.tools.processes import Failure, Processes
from tests.tools.processes import processes as started

LAUNCH = [
    *("accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--num_processes", "2", "--main_process_port", "0"),
]
# Seconds that one evaluation may take on a busy machine.
PATIENCE = 300.0
# An odd number of parts, so that one process has one more of them.
WINDOWS = [*SMALL, "--windows", "3", "--batch", "1"]
LOOP = ["--variant", "backend=reference,loop=on,share=on"]
HERE = ["--device", "cpu", "--quiet"]
OPTIONS = {
    "perplexity": [*WINDOWS, *PLAIN, *LOOP],
    "parity": [*WINDOWS, *PLAIN, "--new", "3", "--kv-dtype", "fp8"],
    "logprobs": [*WINDOWS, "--new", "3", "--samples", "2", *LOOP],
    "recall": [
        *(*HERE, "--tasks", "needle", "--lengths", "96", "--depths", "0", "0.5", "1", "--count", "2"),
        *("--kv-dtype", "fp8"),
    ],
    "sampling": [
        *(*HERE, "--case", "plain", "top-k", "ends", "--prompts", "2", "--samples", "8", "--new", "3", "--calls", "2"),
        *("--length", "9"),
    ],
    "tasks": [*HERE, "--limit", "2", "--num-fewshot", "1"],
    "families": [
        *(*HERE, "--families", "qwen3", "--evaluations", "perplexity", "--windows", "3", "--batch", "1"),
        *("--context", "64", "--stride", "24", "--append", "9", "--piece", "5", "--decode", "4"),
        *("--variant", "share=on", "--variant", "loop=on,share=on,prefix_cache=on"),
    ],
    "fault_table": [
        *(*HERE, "--faults", "position", "--seeds", "1", "--evaluations", "perplexity", "parity", "--windows", "2"),
        *("--context", "96", "--stride", "24", "--append", "12", "--piece", "5", "--decode", "6", *PLAIN),
    ],
}
# Files of reports that are not named as their evaluation.
REPORTS = {"fault_table": "faults"}
# What says when and how it ran, not what came out.
NOT_FIGURES = ("seconds", "command", "environment", "batches_resumed", "task_seconds")


def evaluate(name: str, argv: list[str]) -> tuple[int, str]:
    """The exit status of an evaluation, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        status = importlib.import_module(f"hf_fastattn.eval.{name}").main(argv)
    return status, shown.getvalue()


def figures(folder: Path, name: str) -> dict[str, Any]:
    """What came out."""
    record = json.loads((folder / f"{REPORTS.get(name, name)}.json").read_text())
    return {key: value for key, value in record.items() if key not in NOT_FIGURES}


def arguments(name: str, folder: Path) -> list[str]:
    """Of a run that writes into a folder."""
    return [*OPTIONS[name], "--threads", "1", "--output", str(folder)]


@pytest.fixture(scope="module")
def pair() -> Any:
    with started() as group:
        yield group


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.eval.reporting.report._pyplot", lambda: None)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_give_the_figures_of_one(name: str, pair: Processes, tmp_path: Path) -> None:
    if name == "tasks":
        pytest.importorskip("lm_eval")
    folders = [tmp_path / way for way in ("one", "two")]
    status, shown = evaluate(name, arguments(name, folders[0]))
    pair.send(evaluate, name, arguments(name, folders[1]))
    first, second = (pair.receive(rank, PATIENCE) for rank in range(2))
    assert not isinstance(first, Failure), first.trace
    assert not isinstance(second, Failure), second.trace
    assert status == first[0] == second[0] == 0
    # The first one prints and writes.
    written = f"written: {REPORTS.get(name, name)}.md"
    assert written in shown and written in first[1] and not second[1]
    one, two = (figures(folder, name) for folder in folders)
    for key in one.keys() | two.keys():
        assert one[key] == two[key], key
    assert all(row["verdict"] == "green" for row in one.get("rows", [one]) if not row.get("fault"))
    journals = [sorted((folder / ".journal").glob("*")) for folder in folders]
    if name in ("perplexity", "parity", "logprobs"):
        # The first process keeps the records of both, from which a later run of one goes on.
        assert [len(found) for found in journals] == [1, 1]
        lines = [[json.loads(line) for line in found[0].read_text().splitlines()[1:]] for found in journals]
        for one_line, two_line in zip(*lines, strict=True):
            assert one_line == two_line


@pytest.mark.usefixtures("no_pictures")
def test_accelerate_launches_them(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folders = [tmp_path / way for way in ("one", "two")]
    assert evaluate("recall", arguments("recall", folders[0]))[0] == 0
    words = [sys.executable, "-m", *LAUNCH, "-m", "hf_fastattn.eval.recall", *arguments("recall", folders[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written: recall.md") == 1
    assert figures(folders[0], "recall") == figures(folders[1], "recall")


def squares(count: int, known: list[int], failing: int = -1) -> tuple[list[int], list[int], int, bool]:
    """Records, what this process measured, how often it was told of a part, and whether it is the first one."""
    own: list[int] = []
    told: list[int] = []

    def measure(part: int) -> int:
        if part == failing:
            raise ValueError(f"part {part} cannot be measured")
        # Evaluations inside are this process's own.
        assert processes().count == 1 and measured([3, 4], lambda inner: inner, Journal(None, {})) == [3, 4]
        own.append(part)
        return part * part

    journal = Journal(None, {})
    for part in known:
        # Others do not have the first one's.
        if processes().is_first:
            journal.add(str(part), -part)
    found = measured(range(count), measure, journal, lambda: told.append(1))
    return found, own, len(told), processes().is_first


def test_parts_are_shared_out_and_come_back_in_their_order(pair: Processes) -> None:
    for count, known, shares in (
        (5, [], ([0, 2, 4], [1, 3])),
        (1, [], ([0], [])),
        (0, [], ([], [])),
        (6, [1, 2], ([0, 4], [3, 5])),
    ):
        want = [-part if part in known else part * part for part in range(count)]
        for rank, (found, own, told, first) in enumerate(pair.run(squares, count, known)):
            assert (found, own, told, first) == (want, shares[rank], count, rank == 0)


@pytest.mark.parametrize("failing", [2, 3])
def test_a_part_that_fails_fails_all(failing: int, pair: Processes) -> None:
    pair.send(squares, 5, [], failing)
    failures = [pair.receive(rank) for rank in range(2)]
    mine, other = failures[failing % 2], failures[1 - failing % 2]
    assert (mine.kind, other.kind) == ("ValueError", "RuntimeError")
    assert f"process {failing % 2} of the evaluation failed: ValueError: part {failing}" in other.text
    # They go on together.
    assert [found for found, *_ in pair.run(squares, 3, [])] == [[0, 1, 4]] * 2


def test_one_process_alone() -> None:
    assert squares(3, [])[:3] == ([0, 1, 4], [0, 1, 2], 3)
    with pytest.raises(ValueError, match="cannot be measured"):
        squares(3, [], 1)
