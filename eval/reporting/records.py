"""`Record`: a result that was kept, read again: what it is about, whether it was right, and its figures in short."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A record of `eval/results`.

    Attributes:
        name: of its files.
        kind: the evaluation or benchmark.
        is_accuracy: what it is about, accuracy or speed.
        device: that it ran on; `commit` and `source`: the code, as `environment.source_hash` says it.
        wrong: what was red in it, in words; nothing if all was right.
        figures: a line with what it found.
        markdown: its report; `picture`: a PNG, or None.
    """

    name: str
    kind: str
    is_accuracy: bool
    device: str
    commit: str
    source: str
    wrong: list[str]
    figures: str
    markdown: str
    picture: bytes | None


def read(folder: Path) -> list[Record]:
    """All records of a folder; tables without one are records of their text alone.

    Raises:
        ValueError: there is none.
    """
    found = [_record(folder, path.stem) for path in sorted(folder.glob("*.md"))]
    if not found:
        raise ValueError(f"folder {str(folder)!r} holds no results; evaluations and benchmarks write them with --output")
    return found


def _record(folder: Path, name: str) -> Record:
    data, picture = folder / f"{name}.json", folder / f"{name}.png"
    record: Figures = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}
    kind, where = name.split("-")[0], record.get("environment", {})
    say = FIGURES.get(kind)
    return Record(
        name=name,
        kind=kind,
        is_accuracy="evaluation" in record,
        device=where.get("device") or ("NVIDIA H200" if "h200" in name else "not recorded"),
        commit=where.get("commit", ""),
        source=where.get("source", ""),
        wrong=list(_wrong(record)),
        figures=say(record) if say is not None and record else "",
        markdown=(folder / f"{name}.md").read_text(encoding="utf-8"),
        picture=picture.read_bytes() if picture.is_file() else None,
    )


def _wrong(record: Figures) -> Iterator[str]:
    """What was red: checks that alarm, faults that were missed, cases that are wrong or failed."""
    for check in (*record.get("checks", ()), *record.get("path", ()) * isinstance(record.get("path"), list)):
        if check.get("alarms"):
            yield f"{check['variant']}: {check['name']}"
    if record.get("evaluation") == "faults":
        yield from _missed(record["rows"])
    elif record.get("verdict") == "red":
        yield "its verdict is red"
    for key in ("cases", "cells", "states", "rows"):
        for case in record.get(key, ()) if record.get("evaluation") is None else ():
            named = case.get("name") or case.get("state") or case.get("shape") or case.get("model")
            said = [*case.get("red", ()), *case.get("problems", ()), *case.get("wrong", ())]
            yield from (f"{named}: {one}" for one in said)
            if case.get("agrees") is False:
                yield f"{named}: the results differ"
    yield from (f"{case.get('name')}: {case.get('error', 'failed')}" for case in record.get("failed", ()))


def _missed(rows: list[Figures]) -> Iterator[str]:
    for found in rows:
        caught = all(entry["caught_by"] and not entry["off_path"] for entry in found["variants"])
        if found["fault"] and not caught:
            yield f"the fault {found['fault']!r} was missed by {found['evaluation']}"
        if not found["fault"] and found["verdict"] != "green":
            yield f"{found['evaluation']} alarmed without a fault"


def _perplexity(record: Figures) -> str:
    ours = [row for row in record["series"] if "=" in row["series"]]
    stock = next(row for row in record["series"] if row["series"] == "stock")
    most = max((abs(row["difference"]) for row in ours), default=0.0)
    return f"perplexity {stock['perplexity']:.2f} for both; ours differs by {most:.1e} nats a token at most"


def _parity(record: Figures) -> str:
    ours = [row for row in record["series"] if "=" in row["series"]]
    same, kl = min(row["top1"] for row in ours), max(row["mean_kl"] for row in ours)
    return f"likeliest tokens as the exact model's: {100 * same:.2f}%; KL divergence {kl:.1e} nats"


def _faults(record: Figures) -> str:
    planted = [row for row in record["rows"] if row["fault"]]
    clean = [row for row in record["rows"] if not row["fault"]]
    names = ", ".join(dict.fromkeys(row["fault"] for row in planted))
    alarms = sum(row["verdict"] != "green" for row in clean)
    return f"faults planted: {names}; {alarms} alarms in {len(clean)} runs without one"


def _recall(record: Figures) -> str:
    return "; ".join(
        f"{one['task']}: stock {100 * one['stock']:.1f}%, ours {100 * one['ours']:.1f}%" for one in record["tasks"]
    )


def _tasks(record: Figures) -> str:
    seconds = record["task_seconds"].values()
    ratio = sum(one["stock"] for one in seconds) / sum(one["ours"] for one in seconds)
    return f"{len(record['tasks'])} tasks scored alike, {ratio:.1f} times as fast as HFLM in all"


def _sampling(record: Figures) -> str:
    tests = [test for case in record["cases"] for test in case["tests"]]
    tokens = sum(case["tokens"] for case in record["cases"])
    least = min(test["corrected"] for test in tests)
    return f"{len(tests)} tests of {tokens:,} draws by {record['path']}; smallest corrected p {least:.2g}"


def _speed(record: Figures) -> str:
    found = [case for case in record["cases"] if "stock" in case["systems"] and "patched" in case["systems"]]
    ratios = [case["systems"]["stock"]["token_ms"] / case["systems"]["patched"]["token_ms"] for case in found]
    return f"a token {min(ratios):.2f} to {max(ratios):.2f} times as fast as stock's, {len(found)} cases" if ratios else ""


def _batching(record: Figures) -> str:
    found = []
    for case in record["cases"]:
        systems = {name: one.get("seconds") for name, one in case["systems"].items()}
        if systems.get("ours") and systems.get("stock_batch"):
            found.append(f"{case['name']}: {systems['stock_batch'] / systems['ours']:.1f} times as fast as stock's batches")
    return "; ".join(found)


def _matrix(record: Figures) -> str:
    cells = [cell["ratios"]["token"] for cell in record["cells"] if "token" in cell.get("ratios", {})]
    return (
        f"{len(record['cells'])} cells; a token takes {min(cells):.2f} to {max(cells):.2f} of stock's time" if cells else ""
    )


def _rollouts(record: Figures) -> str:
    ratios = [state["stock"][1] / state["ours"][1] for state in record["states"]]
    return f"a token {min(ratios):.1f} to {max(ratios):.1f} times as fast as stock's, {len(ratios)} states of a trainer"


def _kernels(record: Figures) -> str:
    ratios = [value for row in record["rows"] for value in row["ratios"].values()]
    found = (
        [f"{min(ratios):.2f} to {max(ratios):.2f} of the time of PyTorch's, {len(record['rows'])} shapes"] if ratios else []
    )
    saved = [row["ratios"]["not shared"] for row in record.get("shared", ()) if "not shared" in row.get("ratios", {})]
    if saved:
        found.append(
            f"shared prefixes read {min(saved):.1f} to {max(saved):.1f} times as fast as row by row, {len(saved)} shapes"
        )
    return "; ".join(found)


def _harness(record: Figures) -> str:
    ratios = [case["ratio"] for case in record["cases"]]
    return (
        f"lm-evaluation-harness {min(ratios):.2f} to {max(ratios):.2f} times as fast, {len(ratios)} tasks" if ratios else ""
    )


FIGURES: dict[str, Callable[[Figures], str]] = {
    "perplexity": _perplexity,
    "parity": _parity,
    "faults": _faults,
    "recall": _recall,
    "tasks": _tasks,
    "sampling": _sampling,
    "speed": _speed,
    "batching": _batching,
    "matrix": _matrix,
    "rollouts": _rollouts,
    "attention": _kernels,
    "experts": _kernels,
    "harness": _harness,
}
