"""`eval tasks`, `bench tasks` and `lm-eval` on the shipped checkpoint: scores, counts, and what turns them red."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_fastattn.eval import harness_command, task_speed, tasks
from hf_fastattn.eval.choices import SHIPPED
from hf_fastattn.eval.harness import recorded, scorer

pytest.importorskip("lm_eval")

FEW = ["--device", "cpu", "--dtype", "float32", "--quiet", "--limit", "3", "--num-fewshot", "2"]
NAMES = ["fastattn_next_line", "fastattn_pairs"]


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status = tasks.main([*FEW, *options, "--output", str(tmp_path)])
    return status, json.loads((tmp_path / "tasks.json").read_text())


def test_the_projects_tasks_are_scored_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[int] = []
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: listed.append(1))
    status, record = run(tmp_path)
    # Packages are listed with pip, which takes seconds, and for each task.
    assert not listed
    assert status == 0 and record["verdict"] == "green" and not record["stock_ways"]
    entries = {entry["task"]: entry for entry in record["tasks"]}
    assert set(entries) == {f"fastattn_{name}" for name in ("next_line", "pairs", "needle", "text")}
    for entry in entries.values():
        assert entry["documents"] == 3 and entry["metrics"]
        assert all(one["stock"] == pytest.approx(one["ours"], rel=1e-5) for one in entry["metrics"])
        assert all(isinstance(one["difference_se"], float) for one in entry["metrics"])
    assert entries["fastattn_needle"]["differ"] == 0 and entries["fastattn_pairs"]["metrics"][0]["stock"] == 1.0
    counts = record["counts"]
    assert counts["computed"] == counts["planned"] <= 1.05 * counts["distinct"] < 0.6 * counts["asked"]
    assert (tmp_path / "tasks.png").stat().st_size > 5000 and "± " in (tmp_path / "tasks.md").read_text()


@pytest.mark.parametrize("others", [[], ["lambada_openai"]], ids=["ours", "the harness's too"])
def test_the_harness_s_tasks_are_read_if_one_is_asked_for(
    others: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def manager(**options: Any) -> None:
        assert options["include_defaults"] == bool(others)
        raise Asked

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    with pytest.raises(Asked):
        run(tmp_path, "--tasks", "fastattn_pairs", *others)


def test_scores_that_are_off_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = scorer._sums
    monkeypatch.setattr(scorer, "_sums", lambda *given: [(value - 0.01, likeliest) for value, likeliest in sums(*given)])
    status, record = run(tmp_path, "--tasks", "fastattn_pairs")
    alarms = [check["name"] for entry in record["tasks"] for check in entry["checks"] if check["alarms"]]
    assert status == 1 and alarms == ["largest difference of a log-likelihood, nats"]


def test_the_harness_s_own_way_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fastattn.eval.harness.model.why_not_scored", lambda model: "for a test")
    status, record = run(tmp_path, "--tasks", "fastattn_pairs")
    assert status == 1 and record["stock_ways"] == {"for a test": 12}


def test_tokens_that_are_computed_twice_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "WORTH_CPU", 10**9)
    status, record = run(tmp_path, "--tasks", "fastattn_pairs")
    alarms = [check["name"] for check in record["path"] if check["alarms"]]
    assert status == 1 and alarms == ["tokens computed beyond the distinct ones, share"]


def test_requests_are_recorded_and_timed_again(tmp_path: Path) -> None:
    file = tmp_path / "requests.json"
    recorded.save(file, recorded.record(NAMES, limit=2))
    kinds = {one["task"]: (one["kind"], len(one["requests"])) for one in recorded.load(file)}
    assert kinds == {name: ("loglikelihood", 8) for name in NAMES}
    options = ["--device", "cpu", "--documents", "2", "--requests", str(file), "--output", str(tmp_path), "--task", NAMES[1]]
    task_speed.main(options)
    record = json.loads((tmp_path / "harness-speed.json").read_text())
    assert not record["failed"] and [case["name"] for case in record["cases"]] == NAMES[1:]
    case = record["cases"][0]
    assert case["same"] == 8 and case["rms_nats"] < 1e-3 and not case["stock_ways"]
    assert case["counts"]["computed"] == case["counts"]["planned"] < case["counts"]["asked"] / 4
    # Times on a busy machine tell nothing here.
    assert not [one for one in case["red"] if "stock's time" not in one]


def test_a_file_that_holds_no_requests_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        task_speed.main(["--requests", str(tmp_path / "other.json")])
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.count("\n") == 1 and "holds no requests" in shown


def test_the_harness_s_own_command_knows_the_model(tmp_path: Path) -> None:
    arguments = ["--model_args", f"pretrained={SHIPPED},dtype=float32", "--tasks", "fastattn_pairs", "--num_fewshot", "1"]
    arguments += ["--device", "cpu", "--limit", "2", "--batch_size", "4", "--output_path", str(tmp_path)]
    assert harness_command.main(arguments) == 0
    written = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert written["results"]["fastattn_pairs"]["acc,none"] == 1.0 and written["config"]["model"] == "hf-fastattn"


def test_without_the_harness_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    for command in (harness_command.main, tasks.main):
        with pytest.raises(SystemExit) as ended:
            command([])
        shown = capsys.readouterr().err
        assert ended.value.code == 2 and "pip install 'hf-fastattn[eval]'" in shown.splitlines()[-1]
