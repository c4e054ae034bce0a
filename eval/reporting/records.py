"""`Record`: a result that was kept, read again: what it is about, whether it was right, and its figures in short."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_fastattn.eval.accuracy.noticed import missed
from hf_fastattn.eval.arguments import COMMANDS
from hf_fastattn.eval.reporting.figures import FIGURES, Figures

# What the names of records begin with, for commands that are named otherwise.
KINDS = {"generate": "speed", "tasks": "harness"}
# By what the names of records begin with, whether their commands are about accuracy.
COMMANDED = {
    (KINDS.get(word, word) if group == "bench" else word): group == "eval"
    for group, _, word in (name.partition(" ") for name in COMMANDS)
    if group in ("eval", "bench")
}


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
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    kind, where = _kind(name), record.get("environment", {})
    say = FIGURES.get(kind)
    # The last line of a report says it, in one that has no record beside it too.
    device = re.search(r"^(CPU|NVIDIA [\w-]+)[,;]", text, re.MULTILINE)
    return Record(
        name=name,
        kind=kind,
        is_accuracy="evaluation" in record or COMMANDED.get(kind, False),
        device=where.get("device") or ("NVIDIA H200" if "h200" in name else device[1] if device else "not recorded"),
        commit=where.get("commit", ""),
        source=where.get("source", ""),
        wrong=list(_wrong(record)),
        figures=say(record) if say is not None and record else "",
        markdown=text,
        picture=picture.read_bytes() if picture.is_file() else None,
    )


def _kind(name: str) -> str:
    """What the name of a record begins with: a command if there is one, else its first word."""
    named = [kind for kind in COMMANDED if name == kind or name.startswith(f"{kind}-")]
    return max(named, key=len, default=name.split("-")[0])


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
    yield from (f"a fault was not noticed by two evaluations: {one}" for one in missed(rows))
    for found in rows:
        if not found["fault"] and found["verdict"] != "green":
            yield f"{found['evaluation']} alarmed without a fault"
