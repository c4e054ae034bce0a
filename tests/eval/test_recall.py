"""`eval recall` on few prompts: what is found, the picture, and faults that lose it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_fastattn.eval import recall
from hf_fastattn.eval.accuracy import recall_summary

FEW = ["--device", "cpu", "--dtype", "float32", "--quiet", "--lengths", "160", "256", "--depths", "0", "0.6", "--count", "4"]


def test_both_find_the_same(tmp_path: Path) -> None:
    assert recall.main([*FEW, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "recall.json").read_text())
    assert record["verdict"] == "green" and len(record["cells"]) == 3 * 2 * 2
    assert all(one["stock"] >= 0.8 and one["difference"] == 0 and one["differ"] == 0 for one in record["tasks"])
    # Contexts, and the calls that go on from them.
    assert all(cell["forwards"] >= 2 and not cell["fallbacks"] for cell in record["cells"])
    assert (tmp_path / "recall.png").stat().st_size > 10_000 and "| look-up | 160 |" in (tmp_path / "recall.md").read_text()


@pytest.mark.parametrize("fault", ["page", "position"])
def test_a_fault_in_the_pages_loses_answers(fault: str, tmp_path: Path) -> None:
    assert recall.main([*FEW, "--inject", fault, "--output", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "recall.json").read_text())
    assert record["verdict"] == "red"
    assert [check["name"] for check in record["checks"] if check["alarms"] and "lost" in check["name"]]


def test_what_is_off_the_pages_is_red() -> None:
    cell = {"task": "needle", "length": 9, "depth": 0.0, "stock": [1, 1], "ours": [1, 1], "differ": 0}
    good, bad = ({**cell, "forwards": count, "fallbacks": {}} for count in (2, 0))
    assert recall_summary.summarise([good, good], True)["verdict"] == "green"
    assert recall_summary.summarise([good, bad], True)["verdict"] == "red"
    lost = {**good, "ours": [1, 0], "differ": 1}
    assert recall_summary.summarise([good, lost], True)["verdict"] == "red"
    assert recall_summary.summarise([good, lost], False)["verdict"] == "green"
