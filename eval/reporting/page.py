"""One HTML page of all records: accuracy and speed side by side, what was not covered, and every report with its picture."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from hf_fastattn.eval.arguments import COMMANDS
from hf_fastattn.eval.choices import FAULTS, FORMAT_FAULTS, ROUTING_FAULTS, STEP_FAULTS
from hf_fastattn.eval.reporting.figures import FIGURES
from hf_fastattn.eval.reporting.markdown_html import html_of
from hf_fastattn.eval.reporting.records import KINDS, Record

STYLE = """
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #f4f6f8; }
body { max-width: 1180px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1.05rem; } h4, h5, h6 { font-size: .95rem; }
code, pre { font: .85em ui-monospace, monospace; background: #eef1f4; border-radius: 3px; padding: 0 .25em; }
pre { padding: .6em; overflow-x: auto; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.side > p { margin: 0 0 .4rem; color: #4f5b66; font-weight: 600; }
.card { background: #fff; border: 1px solid #dde3e8; border-left: 5px solid #2ca02c; border-radius: 6px;
  padding: .5rem .8rem; margin: 0 0 .5rem; }
.card.red { border-left-color: #d62728; } .card.none { border-left-color: #8d99a6; }
.card a { font-weight: 600; color: inherit; } .card p { margin: .1rem 0; } .small { color: #4f5b66; font-size: .85rem; }
.red strong, .alarm { color: #b3202a; }
details { background: #fff; border: 1px solid #dde3e8; border-radius: 6px; padding: .5rem .9rem; margin: 0 0 .6rem; }
summary { cursor: pointer; font-weight: 600; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; margin: .5rem 0; }
th, td { border: 1px solid #dde3e8; padding: .2rem .5rem; text-align: left; vertical-align: top; }
th { background: #eef1f4; } ul { padding-left: 1.2rem; }
@media (max-width: 760px) { .sides { grid-template-columns: 1fr; } }
"""


def page(records: Sequence[Record], source: str) -> str:
    """The page, which needs no other file.

    Args:
        source: hash of the code that is there now (`environment.source_hash`).
    """
    wrong = sum(bool(record.wrong) for record in records)
    devices = sorted({_device(record) for record in records}, key=lambda name: (name == "CPU", name))
    parts = [
        f"<h1>hf_fastattn: accuracy and speed</h1><p>{len(records)} records, "
        + (f'<span class="alarm">{wrong} with something red</span>' if wrong else "nothing red")
        + f"; the code that is here now: <code>{html.escape(source)}</code>.</p>"
    ]
    for device in devices:
        own = [record for record in records if _device(record) == device]
        sides = (("Accuracy", [r for r in own if r.is_accuracy]), ("Speed", [r for r in own if not r.is_accuracy]))
        columns = "".join(f'<div class="side"><p>{word}</p>{_cards(some, word)}</div>' for word, some in sides)
        parts.append(f'<h2>{html.escape(device)}</h2><div class="sides">{columns}</div>')
    gaps = "".join(f"<li>{html.escape(one)}</li>" for one in not_covered(records, source))
    parts.append(f"<h2>Not covered</h2><ul>{gaps}</ul><h2>Reports</h2>")
    parts += [_report(record) for record in records]
    head = f'<meta charset="utf-8"><title>hf_fastattn</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def not_covered(records: Sequence[Record], source: str) -> list[str]:
    """What no record says: commands without one on a device, results of other code, draws off the device's loop."""
    found = []
    for name in COMMANDS:
        group, _, word = name.partition(" ")
        if group not in ("eval", "bench"):
            continue
        kind = KINDS.get(word, word) if group == "bench" else word
        known = {"CPU" if record.device.startswith("CPU") else "GPU" for record in records if record.kind == kind}
        missing = [device for device in ("CPU", "GPU") if device not in known]
        if missing:
            found.append(f"{name}: no record on a {' or '.join(missing)}")
    other = [record.name for record in records if record.source and record.source != source]
    if other:
        found.append(f"of other code than what is here now: {', '.join(other)}")
    unknown = [record.name for record in records if not record.source]
    if unknown:
        found.append(f"tables alone, without a record of the code that made them: {', '.join(unknown)}")
    known_faults = (*FAULTS, *ROUTING_FAULTS, *FORMAT_FAULTS, *STEP_FAULTS)
    tables = [record.figures for record in records if record.kind == "faults"]
    never = [fault for fault in known_faults if not any(re.search(rf"(: |, ){fault}[,;]", table) for table in tables)]
    if never:
        found.append(f"faults that no table plants: {', '.join(never)}")
    slow = [record.name for record in records if record.kind == "sampling" and "Transformers' loop" in record.figures]
    if slow:
        found.append(f"draws in the device's loop: {', '.join(slow)} saw Transformers' loop alone")
    unread = sorted({record.kind for record in records if record.source and record.kind not in FIGURES})
    if unread:
        found.append(f"figures in short of: {', '.join(unread)}; their reports are below")
    return found


def _device(record: Record) -> str:
    return "CPU" if record.device.startswith("CPU") else record.device


def _cards(records: Sequence[Record], word: str) -> str:
    if not records:
        return f'<div class="card none"><p>No record of {word.lower()} on this device.</p></div>'
    whole, tables = ([record for record in records if bool(record.source) == kept] for kept in (True, False))
    return "".join([*map(_card, whole), *([_tables_card(tables)] if tables else [])])


def _tables_card(records: Sequence[Record]) -> str:
    """One card for all that has no record beside its text."""
    links = ", ".join(f'<a href="#{html.escape(one.name)}">{html.escape(one.name)}</a>' for one in records)
    return f'<div class="card none"><p>{links}</p><p class="small">tables alone, without a record</p></div>'


def _card(record: Record) -> str:
    name = html.escape(record.name)
    state = "red" if record.wrong else "green"
    lines = [f'<a href="#{name}">{name}</a>' + (" <strong>red</strong>" if record.wrong else "")]
    lines += [html.escape(record.figures)] if record.figures else []
    lines += [f'<span class="alarm">{html.escape(one)}</span>' for one in record.wrong[:3]]
    lines += [f"and {len(record.wrong) - 3} more"] if len(record.wrong) > 3 else []
    lines.append(f'<span class="small">commit {html.escape(record.commit or "not recorded")}</span>')
    return f'<div class="card {state}">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _report(record: Record) -> str:
    name = html.escape(record.name)
    shown = ""
    if record.picture is not None:
        data = base64.b64encode(record.picture).decode()
        shown = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    is_open = " open" if record.picture is not None else ""
    table = f"<details><summary>Tables</summary>{html_of(record.markdown)}</details>" if shown else html_of(record.markdown)
    return f'<details id="{name}"{is_open}><summary>{name}</summary>{shown}{table}</details>'
