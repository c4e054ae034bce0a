"""The page of all results: one file, everything in it, what was red said first and what no record covers listed."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_fastattn.eval import report_page
from hf_fastattn.eval.arguments import COMMANDS
from hf_fastattn.eval.reporting.figures import FIGURES
from hf_fastattn.eval.reporting.markdown_html import html_of
from hf_fastattn.eval.reporting.page import not_covered, page
from hf_fastattn.eval.reporting.records import read

RESULTS = Path(__file__).resolve().parents[3] / "eval" / "results"
ALONE = {"meta", "img", "br", "link"}


class Balance(HTMLParser):
    """Asserts that every element that begins ends, in order, and notes what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in ALONE else [tag]
        self.refers += [str(value) for name, value in attrs if name in ("src", "href")]
        self.ids += [str(value) for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def looked_at(text: str) -> Balance:
    found = Balance()
    found.feed(text)
    assert not found.open
    return found


def test_everything_that_was_kept_is_on_one_page(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    status = report_page.main(["--output", str(file)])
    text, records = file.read_text(), read(RESULTS)
    found = looked_at(text)
    # Nothing is fetched from anywhere.
    assert all(one.startswith(("data:image/png;base64,", "#")) for one in found.refers) and "<script" not in text
    assert sorted(found.ids) == sorted(record.name for record in records) == sorted(p.stem for p in RESULTS.glob("*.md"))
    pictures = [record.picture for record in records if record.picture is not None]
    assert len(pictures) == len(list(RESULTS.glob("*.png"))) > 5
    assert all(base64.b64encode(picture).decode() in text for picture in pictures)
    assert status == int(any(record.wrong for record in records))
    assert text.index(">Accuracy<") < text.index(">Speed<") < text.index("Not covered") < text.index("<h2>Reports")
    for record in records:
        assert record.figures or record.kind not in FIGURES or not record.source, record.name


def kept(folder: Path, name: str, **changes: object) -> Path:
    for ending in ("md", "json"):
        shutil.copy(RESULTS / f"{name}.{ending}", folder)
    record = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps({**record, **changes}))
    return folder


def test_what_is_red_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.html"
    assert report_page.main([str(kept(tmp_path, "parity")), "--output", str(file)]) == 0
    assert "nothing red" in file.read_text()
    record = json.loads((RESULTS / "parity.json").read_text())
    record["checks"][0].update(alarms=True, name="what <was> wrong")
    kept(tmp_path, "parity", checks=record["checks"], verdict="red")
    kept(tmp_path, "speed", failed=[{"name": "a case", "error": "it failed"}])
    assert report_page.main([str(tmp_path), "--output", str(file)]) == 1
    text = file.read_text()
    assert "2 with something red" in text and "what &lt;was&gt; wrong" in text and "a case: it failed" in text
    assert "red: parity, speed" in capsys.readouterr().out
    looked_at(text)


def test_a_fault_that_was_missed_is_red(tmp_path: Path) -> None:
    rows = json.loads((RESULTS / "faults.json").read_text())["rows"]
    planted = [row for row in rows if row["fault"] == "page"]
    for row in planted[:-1]:
        row["variants"][0]["caught_by"] = 0
    rows[-1]["verdict"] = "red"
    wrong = read(kept(tmp_path, "faults", rows=rows))[0].wrong
    name = planted[-1]["evaluation"]
    alarm = f"{rows[-1]['evaluation']} alarmed without a fault"
    assert wrong == [f"a fault was not noticed by two evaluations: page ({name})", alarm]


def test_a_fault_that_two_evaluations_notice_is_not_red(tmp_path: Path) -> None:
    rows = json.loads((RESULTS / "faults.json").read_text())["rows"]
    assert not all(entry["caught_by"] for row in rows if row["fault"] for entry in row["variants"])
    assert read(kept(tmp_path, "faults", rows=rows))[0].wrong == []


def test_what_a_record_is_about_is_read_off_its_name_and_text(tmp_path: Path) -> None:
    tables = {
        "eight-bits-h200": ("eight-bits", False, "NVIDIA H200"), "streaming-h200": ("streaming", True, "NVIDIA H200"),
        "perplexity-int8": ("perplexity", True, "CPU"), "many-rows-h200": ("many", False, "NVIDIA H200"),
        "harness-speed-h200": ("harness", False, "NVIDIA H200"),
    }  # fmt: skip
    for name in tables:
        shutil.copy(RESULTS / f"{name}.md", tmp_path)
    assert {one.name: (one.kind, one.is_accuracy, one.device) for one in read(tmp_path)} == tables


def test_what_no_record_covers_is_listed(tmp_path: Path) -> None:
    (tmp_path / "several-gpus-h200.md").write_text("# A table\n")
    records = read(kept(tmp_path, "perplexity"))
    gaps = "\n".join(not_covered(records, "0123456789ab"))
    assert "eval perplexity: no record on a GPU" in gaps and "eval parity: no record on a CPU or GPU" in gaps
    assert all(name in gaps for name in COMMANDS if name.startswith(("eval ", "bench ")))
    assert "of other code than what is here now: perplexity" in gaps and "tables alone" in gaps
    assert "faults that no table plants: page, position, " in gaps
    planted = "\n".join(not_covered(read(kept(tmp_path, "faults")), "0123456789ab"))
    assert "table plants: expert, weights" in planted and "bench eight-bits: no record" in gaps
    assert "other code" not in "\n".join(not_covered(records, records[0].source))
    assert "No record of speed on this device" in page(records, "x")


def test_a_folder_without_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        report_page.main([str(tmp_path), "--output", str(tmp_path / "report.html")])
    assert ended.value.code == 2 and "holds no results" in capsys.readouterr().err


def test_markdown_becomes_html() -> None:
    text = (
        "# Title\n\nA line\nthat goes on, `a | <b>`, **bold**, [link](x.md).\n\n- one\n  more\n- two\n\n"
        "| a | b |\n|---|---|\n| 1 < 2 | `x|y` |\n\n```\ncode <\n# no heading\n```\n"
    )
    found = html_of(text)
    looked_at(found)
    assert "<h3>Title</h3>" in found and "<p>A line that goes on, <code>a | &lt;b&gt;</code>" in found
    assert "<strong>bold</strong>, link." in found and "<li>one more</li><li>two</li>" in found
    assert "<th>a</th><th>b</th>" in found and "<td>1 &lt; 2</td>" in found and "<pre>code &lt;\n# no heading</pre>" in found
    assert not re.search(r"<(?!/?(h3|p|code|strong|ul|li|div|table|thead|tbody|tr|th|td|pre)\b)", found)
