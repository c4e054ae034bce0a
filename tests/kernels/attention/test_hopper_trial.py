"""What is chosen with a version of Triton that the Gluon kernel was not tested with, whatever its trial does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from hf_fastattn.kernels import backends
from hf_fastattn.kernels.attention import hopper_trial
from tests.kernels.cases import assert_close

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An H100, as far as the choice can see, a version of Triton that nobody has tested, and an empty cache."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backends.choose_backend.cache_clear()
    yield
    backends.choose_backend.cache_clear()


def trial(monkeypatch: pytest.MonkeyPatch, code: str, seconds: float = 60.0) -> None:
    """The child runs `code` instead."""
    monkeypatch.setattr(hopper_trial, "_command", lambda device: [sys.executable, "-S", "-c", code])
    monkeypatch.setattr(hopper_trial, "SECONDS", seconds)


def choose(asked: str = "auto", dim: int = 128) -> tuple[str, str]:
    backends.choose_backend.cache_clear()
    return backends.choose_backend(asked, CUDA, torch.bfloat16, dim)


@pytest.mark.parametrize(
    ("code", "name", "reason"),
    [
        ("raise SystemExit(0)", "hopper", "right results"),
        (f"raise SystemExit({hopper_trial.WRONG})", "triton", "wrong results"),
        (f"raise SystemExit({hopper_trial.FAILED})", "triton", "an error"),
        ("import os; os.abort()", "triton", "a crash (signal 6)"),
        ("import time; time.sleep(60)", "triton", "no end within 1 seconds"),
    ],
)
def test_the_outcome_decides_and_is_kept(monkeypatch: pytest.MonkeyPatch, code: str, name: str, reason: str) -> None:
    trial(monkeypatch, code, 1.0 if "sleep" in code else 60.0)
    backend, why = choose()
    assert backend == name and why.endswith(reason) and "3.99.0" in why
    # A second process reads what was kept: this child would say otherwise.
    trial(monkeypatch, "raise SystemExit(0)" if name == "triton" else "import os; os.abort()")
    assert choose() == (backend, why)
    monkeypatch.setattr(triton, "__version__", "3.99.1")
    assert choose()[0] != name


def test_a_trial_that_did_not_start_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (f"raise SystemExit({hopper_trial.NO_DEVICE})", "import os; os.kill(os.getpid(), 9)", "import nothing_such"):
        trial(monkeypatch, code)
        assert choose()[0] == "triton" and "no start" in choose()[1]
    monkeypatch.setattr(hopper_trial, "_command", lambda device: ["/nowhere/python"])
    assert choose()[0] == "triton" and "no process" in choose()[1]
    trial(monkeypatch, "raise SystemExit(0)")
    assert choose()[0] == "hopper"


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    trial(monkeypatch, "raise SystemExit(0)")
    assert choose()[0] == "hopper"


def test_no_trial_where_it_cannot_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    trial(monkeypatch, "raise SystemExit(0)")
    monkeypatch.setattr(hopper_trial, "why_not_trusted", lambda *args: pytest.fail("a trial"))
    assert choose(dim=96)[0] == "triton"
    assert choose("triton")[0] == "triton"
    for version in ("3.6.0", "3.9.0"):
        monkeypatch.setattr(triton, "__version__", version)
        assert choose() == ("hopper", f"a Hopper GPU, and Triton {version}, which was tested")


def test_hopper_asked_for_and_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    trial(monkeypatch, "import os; os.abort()")
    with pytest.raises(ValueError, match="crash"):
        choose("hopper")


def test_the_child_finds_the_package_and_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status = hopper_trial._run(hopper_trial._command(CUDA), 120.0, tmp_path / "kept")
    assert f"exit status {hopper_trial.NO_DEVICE}" in status and not (tmp_path / "kept").exists()


def test_what_the_results_are_compared_with() -> None:
    from hf_fastattn.kernels.attention.read_plan import ReadPlan
    from hf_fastattn.kernels.attention.reference import paged_attention

    q, k_pages, v_pages, table = hopper_trial._batch(64, torch.device("cpu"))
    lengths = [count + past for count, past in zip(hopper_trial.COUNTS, hopper_trial.PASTS, strict=True)]
    plan = ReadPlan(table.tolist(), hopper_trial.COUNTS, lengths, hopper_trial.PAGE)
    want, _ = paged_attention(q.double(), k_pages.double(), v_pages.double(), plan, scale=64**-0.5)
    assert_close("attention", hopper_trial._expected(q, k_pages, v_pages, table), want.float(), want)


@pytest.mark.gpu
def test_the_trial_on_a_gpu() -> None:
    properties = torch.cuda.get_device_properties(CUDA)
    if (properties.major, properties.minor) != backends.HOPPER:
        pytest.skip("needs a Hopper GPU")
    assert subprocess.run(hopper_trial._command(CUDA)).returncode == 0
