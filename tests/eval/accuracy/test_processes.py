"""Evaluations under `accelerate launch`: the figures of two processes are those of one, to the bit."""

from __future__ import annotations

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
from tests.tools.processes import Processes
from tests.tools.processes import processes as started

LAUNCH = [
    *("accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--num_processes", "2", "--main_process_port", "0"),
]
# An odd number of batches, so that one process has one more of them.
SIZE = [*SMALL, "--windows", "3", "--batch", "1", "--threads", "1"]
LOOP = ["--variant", "backend=reference,loop=on,share=on"]
EXTRA = {"perplexity": [*PLAIN, *LOOP], "parity": ["--new", "4", *LOOP], "logprobs": ["--new", "4", "--samples", "2", *LOOP]}
# What says when and how it ran, not what came out.
NOT_FIGURES = ("seconds", "command", "environment", "batches_resumed")


def record(name: str, folder: Path, launched: bool) -> dict[str, Any]:
    module = [f"hf_fastattn.eval.{name}", *SIZE, *EXTRA[name], "--output", str(folder)]
    words = [*LAUNCH, "-m", *module] if launched else module
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f"written: {name}.md") == 1
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["parity", "logprobs"])
def test_two_processes_give_the_figures_of_one(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    one, two = record(name, tmp_path / "one", False), record(name, tmp_path / "two", True)
    for key in one.keys() | two.keys():
        if key not in NOT_FIGURES:
            assert one[key] == two[key], key
    assert one["verdict"] == "green"
    journals = [sorted((tmp_path / way / ".journal").iterdir()) for way in ("one", "two")]
    # The first process keeps the records of both, from which a later run of one goes on.
    assert [len(found) for found in journals] == [1, 1]
    assert journals[0][0].read_text().splitlines()[1:] == journals[1][0].read_text().splitlines()[1:]


@pytest.fixture(scope="module")
def pair() -> Any:
    with started() as group:
        yield group


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
