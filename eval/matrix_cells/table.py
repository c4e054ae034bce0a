"""The report of the matrix in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_fastattn.eval.reporting.report import environment_lines

NOTES = """First: a call of one token. A token: the difference between calls of 1 + `new` tokens and of one, over `new` (in a
chat of both turns). Both in ms (on a CPU of the process's own time), medians of interleaved pairs. Peak: MB over what was
there before, in the first calls; `+` is what graphs keep for themselves (after a capture it counts as reserved, not as
allocated); reserved: the most taken from the device. RED: ours computes something else, or is slower by more than
{slower:.0%} both in the median of the pairs and at its best (of four times as many pairs where the first ones say so), or
larger by more than 3% and 128 MB. Allowed: slower by more than that, for the reason that is named below."""
TIMES = ("cell", "first, stock", "ours", "ratio", "a token, stock", "ours", "ratio")
MEMORY = ("peak, stock", "ours", "reserved, stock", "ours")


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    settings, cells = record["settings"], record["cells"]
    with_memory = any(row["ours"]["peak"] is not None for row in cells)
    head = [*TIMES, *(MEMORY if with_memory else ()), "path of ours", ""]
    lines = ["# Matrix of calls, families and states", "", environment_lines(record), ""]
    lines += [f"`new` {settings['new']}, {settings['pairs']} pairs.", "", NOTES.format(slower=settings["slower"] - 1), ""]
    lines += [_line(head), "|" + "---|" * len(head)]
    lines += [_line(_cells(row, with_memory)) for row in cells]
    wrong = [row for row in cells if row["red"]]
    lines += ["", f"{len(wrong)} of {len(cells)} cells are red."]
    lines += [f"- **RED** {row['name']}: {'; '.join(row['red'])}. {row['detail']}. {row['path']}" for row in wrong]
    lines += [f"- {row['name']} is allowed to be slower: {row['allowed']}." for row in cells if row["allowed"]]
    for kind in ("failed", "skipped"):
        lines += [f"- **{found['cell']} {kind}**: {found['error']}" for found in record[kind]]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], with_memory: bool) -> list[str]:
    cells = [row["name"]]
    for name in ("first", "token"):
        cells += [f"{row[side][f'{name}_ms']:.2f}" for side in ("stock", "ours")] + [f"{row['ratios'][name]:.2f}"]
    if with_memory:
        peaks = [row[side]["peak"] for side in ("stock", "ours")]
        cells += [
            _megabytes(peak["allocated"]) + (f" + {_megabytes(peak['graphs'])}" if peak["graphs"] else "") for peak in peaks
        ]
        cells += [_megabytes(peak["reserved"]) for peak in peaks]
    return [*cells, row["path"], "**RED**" if row["red"] else "allowed" if row["allowed"] else ""]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
