"""All evaluations by one command: what each finds on the quick set, its sizes and options, one red verdict makes all red."""

from __future__ import annotations

import importlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

from hf_fastattn import cli
from hf_fastattn.eval import all_evaluations
from hf_fastattn.eval.arguments import COMMANDS, parser
from hf_fastattn.eval.choices import EVALUATED, QUICK, SAMPLERS, TOGETHER, WHOLE, WINDOWS_16
from hf_fastattn.eval.fault_table import EVALUATIONS

ALONE, SHARED, LOOP = "backend=reference,share=off", "backend=reference,share=on", "backend=reference,loop=on,share=on"
# Processor seconds of all together, which are wall seconds where nothing else runs.
MOST_SECONDS = 120


def test_the_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    given = ["--quick", "--device", "cpu", "--quiet", "--threads", "1", "--output", str(tmp_path)]
    assert cli.main(["eval", "all", *given]) == 0
    assert time.process_time() - start < MOST_SECONDS
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["verdict"] == "green" and [one["name"] for one in record["outcomes"]] == list(TOGETHER)
    assert (tmp_path / "all.md").read_text() in shown + "\n"
    for name in TOGETHER:
        if name == "tasks" and importlib.util.find_spec("lm_eval") is None:
            assert "| tasks | not run: lm_eval is not installed | 0 | 0 |" in shown
            continue
        assert f"| {name} | green |" in shown
        text, record = ((tmp_path / f"{name}.{end}").read_text() for end in ("md", "json"))
        assert str(tmp_path.parent) not in record and "Took " in text
        if name in LOOKED_AT:
            LOOKED_AT[name](json.loads(record), text)
        if importlib.util.find_spec("matplotlib") is not None:
            assert (tmp_path / f"{name}.png").stat().st_size > 5000


def losses(record: dict[str, Any], text: str) -> None:
    """Of perplexity."""
    assert record["tokens"] == 4 * 24
    assert {"python", "torch", "transformers", "device", "source"} <= set(record["environment"])
    names = [row["series"] for row in record["series"]]
    assert names[:3] == ["exact", "stock, one forward", "stock"] and {ALONE, SHARED, LOOP} < set(names)
    assert all(row["loss"] == pytest.approx(record["series"][0]["loss"], abs=1e-5) for row in record["series"])
    assert "# Perplexity: green" in text
    steps(record, text)


def errors(record: dict[str, Any], text: str) -> None:
    """Of parity."""
    assert not record["first_wrong"] and "# Parity: green" in text
    for row in record["series"]:
        assert row["top1"] == 1 and 0 < row["max_error"] < 1e-3 and 0 <= row["mean_kl"] < 1e-9
        assert len(row["layer_rms"]) == 7 and max(row["layer_rms"]) < 1e-5
    steps(record, text)


def steps(record: dict[str, Any], text: str) -> None:
    """Of what looks at the device's loop: it ran, and what it does was looked at."""
    assert record["planted"] == 0 and any("prefix_cache" in name for name in record["variants"])
    checks = {check["name"]: check for check in record["checks"] if check["variant"] == LOOP}
    assert checks["batches off the device's loop"]["value"] == checks["batches without replayed steps"]["value"] == 0
    assert "batches whose prefixes were read row by row" in checks
    assert ("batches that kept rows that were over" in checks) == (record["evaluation"] != "logprobs")
    looped = [line for line in text.splitlines() if line.startswith(f"| {LOOP} | reference |")]
    assert looped and "not looked at" not in looped[0] and "## What ran" in text


def recalled(record: dict[str, Any], text: str) -> None:
    """Of recall."""
    assert len(record["cells"]) == 3 * 2 * 2 and "| look-up | 160 |" in text
    assert all(one["stock"] >= 0.7 and one["difference"] == 0 and one["differ"] == 0 for one in record["tasks"])
    # Contexts, and the calls that go on from them.
    assert all(cell["forwards"] >= 2 and not cell["fallbacks"] for cell in record["cells"])


def drawn(record: dict[str, Any], text: str) -> None:
    """Of sampling."""
    assert [case["name"] for case in record["cases"]] == list(SAMPLERS) and record["path"] == "Transformers' loop"
    assert record["off_loop"] == list(SAMPLERS) and "the model is on cpu" in text
    tests = [test for case in record["cases"] for test in case["tests"]]
    assert len(tests) >= 7 * len(SAMPLERS) and all(test["corrected"] >= test["p"] for test in tests)


def streamed(record: dict[str, Any], text: str) -> None:
    """Of streaming."""
    sizes = {name: record[name] for name in ("tokens", "places", "sinks", "capacity")}
    assert sizes == {"tokens": 1200, "places": 24, "sinks": 16, "capacity": 16 + 192 + 48}
    assert record["generated"]["pages"] and set(record["generated"]["pages"]) == {sizes["capacity"] // 16}
    assert record["perplexities"]["streaming"] < record["perplexities"]["plain windowing"] and "encoded again" in text


def caught(record: dict[str, Any], text: str) -> None:
    """Of faults."""
    assert "all caught by two evaluations or more" in text
    assert {row["fault"] for row in record["rows"]} == {"mask", "step-slot"}


LOOKED_AT: dict[str, Any] = {
    "perplexity": losses, "parity": errors, "logprobs": steps, "recall": recalled, "sampling": drawn,
    "streaming": streamed, "faults": caught,
}  # fmt: skip


@pytest.mark.parametrize("red", [None, "parity"])
def test_one_red_verdict_makes_all_red(red: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr(all_evaluations, "NEEDS", {})
    for name in TOGETHER:
        module = importlib.import_module(COMMANDS[f"eval {name}"].module)
        monkeypatch.setattr(module, "main", lambda argv, name=name: (asked.update({name: argv}), int(name == red))[1])
    given = ["--quick", "--device", "cpu", "--threads", "2", "--quiet"]
    assert cli.main(["eval", "all", *given]) == int(red is not None)
    assert list(asked) == list(TOGETHER)
    for name, argv in asked.items():
        # Each takes what it is given.
        parsed = parser(f"eval {name}").parse(argv)
        assert parsed.device == "cpu" and parsed.quiet and parsed.threads == 2
        assert argv[: len(QUICK[name])] == list(QUICK[name])
    shown = capsys.readouterr().out
    assert f"| parity | {'red' if red else 'green'} | 0 | 0 |" in shown and "| all | | 0 | 0 |" in shown


def test_sixteen_bits_take_many_windows() -> None:
    for name in TOGETHER:
        wide, narrow = all_evaluations.sizes(name, False, False), all_evaluations.sizes(name, False, True)
        assert wide == WHOLE[name] == narrow[: len(wide)] and all_evaluations.sizes(name, True, True) == QUICK[name]
        more = name in (*EVALUATED, "faults")
        assert narrow[len(wide) :] == (("--windows", str(WINDOWS_16)) if more else ())
        parser(f"eval {name}").parse(list(narrow))


def test_every_evaluation_is_held_against_faults() -> None:
    assert set(EVALUATED) == set(EVALUATIONS) and set(QUICK) == set(WHOLE) == set(TOGETHER)
    assert all_evaluations.table([]).endswith("| all | | 0 | 0 |")
