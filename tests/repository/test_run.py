"""The closing line of `make test`: what it counts, and that a failing test fails the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import run

FILES = {
    "conftest.py": (Path(__file__).parents[1] / "conftest.py").read_text(),
    "test_some.py": """
import os
import pytest

def test_plain(): assert os.environ["TRITON_INTERPRET"] == "0"

@pytest.mark.interpreter
def test_interpreted(): assert os.environ["TRITON_INTERPRET"] == "1"

@pytest.mark.skip(reason="no such device")
def test_skipped(): pass
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_one_line_for_both_runs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["-n0", str(folder)]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("passed 2, skipped 1 (1: no such device), in ")


REPORT = f"""
<testsuites><testsuite>
<testcase name="test_left" file="tests/test_a.py"><skipped message="{run.RUN_BY_THE_OTHER}"/></testcase>
<testcase name="test_done" file="tests/test_b.py"/>
</testsuite></testsuites>
"""


@pytest.mark.parametrize(("asked", "second"), [([], ["tests/test_a.py"]), (["tests"], ["tests"])])
def test_the_second_run_takes_the_files_that_were_left_to_it(
    asked: list[str], second: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def reported(arguments: list[str], interpret: bool, report: Path) -> int:
        report.write_text(REPORT.strip())
        given.append((interpret, arguments))
        return 0

    monkeypatch.setattr(run, "run", reported)
    assert run.main(asked) == 0
    assert given == [(False, asked), (True, second)]


@pytest.mark.parametrize(("cores", "workers"), [(1, None), (2, "3"), (64, "4")])
def test_workers(cores: int, workers: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert run.workers([]) == ([] if workers is None else ["-n", workers, "--dist", "worksteal"])
    assert run.workers(["tests"])[1:2] == ([] if workers is None else [str(min(cores, 4))])
    assert run.workers(["-n0", "tests"]) == []


# Ends the process that reports.
CUT_OFF = """
import os, signal, time

def test_bad(): assert False

def test_cut_off():
    # The report before is under way.
    time.sleep(1)
    os.kill(os.getppid(), signal.SIGKILL)
"""
BAD = """
import os
import pytest

@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "{failing}", reason="{reason}")
def test_bad(): assert False

def test_good(): pass
"""


@pytest.mark.parametrize(
    ("failing", "reason", "line"),
    [("0", "", "failed 1, passed 1, in "), ("1", f"{run.RUN_BY_THE_OTHER} and more", "failed 1, passed 2, in ")],
)
def test_a_failure_in_either_run_fails_both(
    failing: str, reason: str, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second run is made where the first has left something to it."""
    (tmp_path / "test_bad.py").write_text(BAD.format(failing=failing, reason=reason))
    assert run.main(["-n0", str(tmp_path)]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith(line)


def test_a_failure_is_named_at_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run that is cut off has no summary."""
    (folder / "test_cut_off.py").write_text(CUT_OFF)
    command = [sys.executable, "-m", "pytest", "-q", "-n1", f"--rootdir={folder}", str(folder / "test_cut_off.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command, env=environment, timeout=300)
    written = capfd.readouterr()
    assert written.err.count("\nFAILED in call: test_cut_off.py::test_bad\n") == 1
    assert "short test summary" not in written.out
