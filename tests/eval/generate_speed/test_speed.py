"""The `generate()` benchmark on tiny models: every kind of call runs and is reported; red cases show no ratio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hf_fastattn import cli
from hf_fastattn.eval import shapes, speed
from hf_fastattn.eval.accuracy.agreement import Agreement, Verdict
from hf_fastattn.eval.choices import KINDS
from hf_fastattn.eval.generate_speed import bench as bench_module
from hf_fastattn.eval.generate_speed.cases import ENDING, Case
from hf_fastattn.eval.generate_speed.systems import twin
from tests.tools.models import COMMON, tiny
from tests.tools.reexecuted import reexecuted_loop

CPU = ["--device", "cpu", "--pairs", "1", "--new", "4", "--dtype", "float32"]
ANYWHERE = [kind for kind in KINDS if kind not in (*ENDING, "drafts")]
SMALL = ["--batch", "2", "--prompt", "24"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny("llama").save_pretrained(folder)
    return folder


def bench(*arguments: str, output: Path) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON record and Markdown of a run."""
    status = cli.main(["bench", "generate", *CPU, *arguments, "--output", str(output)])
    return status, json.loads((output / "speed.json").read_text()), (output / "speed.md").read_text()


def table_rows(text: str, system: str) -> list[list[str]]:
    """The cells of a system's lines."""
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|"))
    return [row for row in cells if len(row) > 1 and row[1] == system]


def test_every_kind_is_measured(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, record, text = bench("--model", checkpoint, "--kind", *ANYWHERE, *SMALL, output=tmp_path)
    assert status == 0
    assert [row["kind"] for row in record["cases"]] == ANYWHERE
    for row in record["cases"]:
        samples = row["kind"] == "samples"
        assert row["agrees"] and not row["problems"] and row["checked"] == row["name"]
        call = row["counters"]
        assert call["forwards"] == 5 and call["fallbacks"] == {}
        # One prompt of 24 tokens for all samples, one for each row otherwise.
        assert call["prompt_tokens"] == (24 if samples else 48) and (call["pages_shared"] > 0) == samples
        assert list(row["systems"]) == ["stock", "patched"]
        for found in row["systems"].values():
            assert found["first_ms"] > 0 and len(found["timings"]) == 1 and found["new"] == 4
            assert found["tokens_per_s"] == pytest.approx(2e3 / found["token_ms"])
            assert found["limit_ms"] is None and found["peak_gb"] is None
        timings = [row["systems"][name]["timings"][0] for name in ("patched", "stock")]
        assert row["ratios"]["stock"] == {name: timings[0][name] / timings[1][name] for name in ("first", "token")}
        assert (row["first_over_one_sample"] is not None) == samples
    assert [row["process_first_call_s"] is None for row in record["cases"]] == [False, True, True, True]
    assert {"command", "environment", "settings", "seconds", "read_tbs", "failed", "profiles"} <= set(record)
    for kind, stock, ours in zip(ANYWHERE, table_rows(text, "stock"), table_rows(text, "patched"), strict=True):
        assert f"### {kind}" in text
        assert len([float(cell) for cell in stock[-2:]]) == 2
        assert ours[-2:] == ["", ""]
    assert "RED" not in text and "Against the targets" not in text
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record


def test_drafts(checkpoint: str, tmp_path: Path) -> None:
    status, record, _ = bench("--model", checkpoint, "--kind", "drafts", "--batch", "1", "--prompt", "60", output=tmp_path)
    row = record["cases"][0]
    assert status == 0 and row["agrees"] and not row["problems"] and row["ratios"]["stock"]["token"] > 0
    # The prompt, and drafts of several tokens.
    assert row["counters"]["prompt_tokens"] >= 60 and 2 <= row["counters"]["forwards"] <= 5


def test_a_kind_may_be_checked_once(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--batch", "2", "1", "--prompt", "24", "40", "--check", "kind"]
    status, record, text = bench("--model", checkpoint, *sizes, output=tmp_path)
    assert status == 0 and [row["checked"] for row in record["cases"]] == ["2 x 24"] * 2
    assert text.count("(checked for 2 x 24)") == 1 and all(row["ratios"] for row in record["cases"])
    monkeypatch.setattr(Agreement, "__call__", lambda *given: Verdict(False, "planted"))
    status, record, text = bench("--model", checkpoint, *sizes, output=tmp_path)
    assert status == 1 and not any(row["ratios"] for row in record["cases"])


def test_red_shows_no_ratio(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disturbed(model: Any) -> Any:
        other = twin(model)
        other.model.norm.weight = nn.Parameter(1.05 * other.model.norm.weight.detach())
        return other

    monkeypatch.setattr(bench_module, "twin", disturbed)
    status, record, text = bench("--model", checkpoint, "--kind", "greedy", "samples", *SMALL, output=tmp_path)
    assert status == 1
    for row in record["cases"]:
        assert not row["agrees"] and row["ratios"] == {} and row["first_over_one_sample"] is None
    assert [row[-2:] for row in table_rows(text, "stock")] == [["RED", "RED"]] * 2
    assert "First token over" not in text


def test_fallback_shows_no_ratio(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_cache = {"do_sample": False, "use_cache": False}
    monkeypatch.setattr(Case, "arguments", lambda self, rows=None: stock_cache)
    status, record, text = bench("--model", checkpoint, *SMALL, output=tmp_path)
    (row,) = record["cases"]
    assert status == 1 and row["agrees"] and row["ratios"] == {}
    assert "use_cache=False" in row["problems"][0] and "0 paged forwards for 5 tokens" in row["problems"][1]
    assert "**RED**: fell back" in text


def test_rows_that_end(checkpoint: str, tmp_path: Path) -> None:
    assert Case("finished", 4, 8).lengths(9) == [3, 5, 7, 9] and Case("finished", 4, 8).lengths(1) == [1] * 4
    assert Case("early", 4, 8).lengths(1024) == [45, 128, 362, 1024] and Case("early", 4, 8).lengths(9) == [3, 5, 7, 9]
    status, record, text = bench("--model", checkpoint, "--kind", "finished", *SMALL, output=tmp_path)
    assert status == 1 and "rows did not end early" in text and record["cases"][0]["ratios"] == {}
    with reexecuted_loop():
        status, record, text = bench("--model", checkpoint, "--kind", "finished", *SMALL, output=tmp_path)
    (row,) = record["cases"]
    assert status == 0 and list(row["systems"]) == ["stays", "patched"] and list(row["ratios"]) == ["stays"]
    assert row["counters"]["fast_loops"] == 1 and row["counters"]["forwards"] == 5
    assert row["systems"]["stays"]["first_call_s"] is None and row["systems"]["patched"]["first_call_s"] > 0


def test_the_loop_on_the_device_is_told_from_transformers(checkpoint: str, tmp_path: Path) -> None:
    with reexecuted_loop():
        status, record, text = bench("--model", checkpoint, "--kind", *ANYWHERE, *SMALL, output=tmp_path)
    assert status == 0
    assert [row["counters"]["fast_loops"] for row in record["cases"]] == [int(k != "callbacks") for k in ANYWHERE]
    assert text.count("| on the device |") == 3 and text.count("| Transformers' |") == 1


def test_a_failing_case_is_named_and_others_go_on(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench_module.Bench.measure

    def fail_on_sampling(self: bench_module.Bench, case: Case) -> dict[str, Any]:
        if case.kind == "sampling":
            raise RuntimeError("planted")
        return measure(self, case)

    monkeypatch.setattr(bench_module.Bench, "measure", fail_on_sampling)
    status, record, text = bench("--model", checkpoint, "--kind", "sampling", "greedy", *SMALL, output=tmp_path)
    assert status == 1 and [row["kind"] for row in record["cases"]] == ["greedy"]
    assert record["failed"] == [{"case": "sampling 2 x 24", "error": "RuntimeError: planted"}]
    assert "**sampling 2 x 24 failed**: RuntimeError: planted" in text


def test_targets_of_the_shape_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "llama-3-8b", {**COMMON, "model_type": "llama"})
    status, record, text = bench("--shape", "llama-3-8b", "--batch", "1", "--prompt", "512", output=tmp_path)
    assert status == 0 and record["settings"]["model"] == "llama-3-8b, random weights"
    lines = [line for line in text.splitlines() if line.startswith("| greedy 1 x 512 |")]
    assert any("| a token, ms |" in line and "| 4.6 | 3.9 |" in line for line in lines)
    assert any("| first call of the process, s |" in line and "| 15 | 5 |" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "64"], "--prompt needs --batch"),
        (["--batch", "1", "2", "4", "--prompt", "64", "32"], "one for each"),
        (["--batch", "1", "--prompt", "2000"], "but the model has 1024"),
        (["--kind", "greedy", "finished"], "['finished'] needs --batch"),
        (["--pairs", "0"], "must be at least 1"),
        (["--compile"], "need a CUDA device"),
        (["--profile", "1"], "need a CUDA device"),
        (["--patch", "page_sise=3"], "is no option=value"),
        (["--patch", "share=on"], "no option of patch()"),
    ],
)
def test_what_cannot_be_run_is_refused(
    checkpoint: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        speed.main([*CPU, "--model", checkpoint, *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_steps_are_replayed_and_profiled(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    model.save_pretrained(folder)
    kinds = [kind for kind in KINDS if kind != "drafts"]
    sizes = ["--kind", *kinds, *SMALL, "--new", "300", "--pairs", "2", "--profile", "2"]
    output = tmp_path / "results"
    assert speed.main(["--model", str(folder), *sizes, "--output", str(output)]) == 0
    record = json.loads((output / "speed.json").read_text())
    assert record["read_tbs"] > 0 and record["settings"]["dtype"] == "bfloat16"
    for row in record["cases"]:
        assert row["counters"]["graphs_replayed"] > 0
        for name, found in row["systems"].items():
            # `stays` borrows the model, whose pages are there already.
            assert found["peak_gb"] is None if name == "stays" else found["peak_gb"] > 0
            assert 0 < found["share_of_limit"] < 1
    (profile,) = record["profiles"]
    assert profile["kernels"] and 0 < profile["sum_us"] < 2 * profile["step_us"] and profile["prompt"] == 24
