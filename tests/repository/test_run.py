"""The closing line of `make test`: what it counts, and that a failing test fails the whole."""

from __future__ import annotations

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


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_failure_in_either_run_fails_both(failing: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    test = f"import os\n\ndef test_bad(): assert os.environ['TRITON_INTERPRET'] != '{failing}'\n"
    (tmp_path / "test_bad.py").write_text(test)
    assert run.main(["-n0", str(tmp_path)]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("failed 1, passed 1, in ")
