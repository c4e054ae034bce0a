"""`eval recall` on few prompts: faults that lose what is found, what 8 bits cost, and options that have no meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_fastattn.eval import recall
from hf_fastattn.eval.accuracy import recall_summary
from hf_fastattn.eval.choices import KV_DTYPES

FEW = ["--device", "cpu", "--dtype", "float32", "--quiet", "--lengths", "160", "--depths", "0", "0.6", "--count", "4"]


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    status = recall.main([*FEW, *options, "--output", str(tmp_path)])
    return status, json.loads((tmp_path / "recall.json").read_text())


@pytest.mark.parametrize("fault", ["page", "position"])
def test_a_fault_in_the_pages_loses_answers(fault: str, tmp_path: Path) -> None:
    status, record = run(tmp_path, "--tasks", "needle", "--inject", fault)
    assert status == 1 and record["verdict"] == "red" and record["planted"] > 0
    assert [check["name"] for check in record["checks"] if check["alarms"] and "lost" in check["name"]]
    assert f"fault **{fault}** planted" in (tmp_path / "recall.md").read_text()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_eight_bits_are_held_against_rounded_caches(kv_dtype: str, tmp_path: Path) -> None:
    status, record = run(tmp_path, "--tasks", "needle", "--kv-dtype", kv_dtype, "--variant", "page_size=64")
    assert status == 0 and record["settings"]["kv_dtype"] == kv_dtype and record["planted"] == 0
    (task,) = record["tasks"]
    assert task["stock"] == task["rounded"] == task["ours"] == 1 and task["differ"] == 0
    cost = next(check for check in record["checks"] if check["name"] == "points that 8 bits lose")
    assert (cost["value"], cost["limit"]) == (0, 1) and cost["note"].startswith("95%: ")
    assert "| task | prompts | stock | stock, rounded | patched |" in (tmp_path / "recall.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--variant", "share=on"], "has share or loop"),
        (["--variant", "no_such=1"], "is no option=value"),
        (["--inject", "kv_scale"], "kv_scale needs 8-bit keys and values; give --kv-dtype"),
    ],
)
def test_what_has_no_meaning_is_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        recall.main([*FEW, *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_more_than_a_point_is_red() -> None:
    cell = {"task": "needle", "length": 9, "depth": 0.0, "differ": 0, "forwards": 2, "fallbacks": {}}
    right = [1] * 200

    def cost(lost: int) -> tuple[str, dict[str, Any]]:
        ours = [0] * lost + right[lost:]
        record = recall_summary.summarise([{**cell, "stock": right, "rounded": ours, "ours": ours}], True)
        return record["verdict"], record["checks"][-1]

    assert cost(2)[0] == "green" and cost(2)[1]["value"] == pytest.approx(1) and not cost(2)[1]["alarms"]
    assert cost(3)[0] == "red" and cost(3)[1]["alarms"] and cost(3)[1]["variant"] == "all"
    low, high = (float(word) for word in cost(0)[1]["note"].removeprefix("95%: ").split(" to "))
    # That nothing was lost of 200 does not show that nothing is.
    assert low == -high and 0.5 < high < 1.5


def test_what_is_off_the_pages_is_red() -> None:
    cell = {"task": "needle", "length": 9, "depth": 0.0, "stock": [1, 1], "ours": [1, 1], "differ": 0}
    good, bad = ({**cell, "forwards": count, "fallbacks": {}} for count in (2, 0))
    assert recall_summary.summarise([good, good], True)["verdict"] == "green"
    assert recall_summary.summarise([good, bad], True)["verdict"] == "red"
    lost = {**good, "ours": [1, 0], "differ": 1}
    assert recall_summary.summarise([good, lost], True)["verdict"] == "red"
    assert recall_summary.summarise([good, lost], False)["verdict"] == "green"
