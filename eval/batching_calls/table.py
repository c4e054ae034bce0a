"""The report of the batching benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_fastattn.eval.reporting import report

NAMES = {
    "stock_batch": "stock `generate_batch`",
    "stock_padded": "stock `generate`, padded",
    "patched_padded": "patched `generate`, padded",
    "rows_kept": "patched `generate`, padded, ended rows kept",
    "ours": "patched `generate_batch`",
}
NOTES = """Times are those of whole calls, medians of interleaved rounds on other prompts of the same lengths; tokens are
those that were asked for. Serving: from the first request to the last token, without the start and the end of the manager.
Padded calls take the requests sorted by their prompts' lengths in batches of the best size that was tried, and go on until
the last row of a batch has ended; the patched one's rows leave when they have ended (on a GPU). Gaps: ms between tokens of a
request, of some requests where all are there at once. Steady: from the last request's first token until half of the rows
have ended; the limit is reading weights, and keys and values of all rows, at the measured speed of reading. "At least":
stopped before it was done, what was left counted at the quickest pace seen. "Scaled": not all of it was timed."""
OFFLINE = (
    "case",
    "system",
    "s",
    "serving",
    "tokens/s",
    "ours / this",
    "gap",
    "p99",
    "steady rows",
    "steady ms a step",
    "of limit",
    "",
)
ARRIVAL = (
    "case",
    "system",
    "gap before",
    "gap beside",
    "p99 beside",
    "p99 / gap before",
    "first token of the long prompt, s",
)
LOAD = ("case", "system", "offered, requests/s", "tokens/s", "gap", "p99", "first token, ms", "p99")


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    lines = ["# Requests of different lengths", "", report.environment_lines(record), ""]
    read = f", reading {record['read_tbs']:.2f} TB/s" if record["read_tbs"] else ""
    patched = f", patched with `{record['settings']['patch']}`" if record["settings"].get("patch") else ""
    lines += [f"{record['dtype']}, {record['settings']['pairs']} rounds{read}{patched}.", ""]
    lines += [f"- {_described(row)}" for row in record["cases"]]
    lines += ["", NOTES]
    for kind, head, cells in (("offline", OFFLINE, _offline), ("arrival", ARRIVAL, _arrival), ("load", LOAD, _load)):
        lines += _table([row for row in record["cases"] if row["kind"] == kind], head, cells)
    lines += ["", *(f"- {row['name']}: {row['detail']}; {_aims(row)}" for row in record["cases"])]
    lines += [f"- **RED** {row['name']}: {', '.join(row['red'])}" for row in record["cases"] if row["red"]]
    lines += [f"- **{found['name']} failed**: {found['error']}" for found in record["failed"]]
    return "\n".join(lines)


def _described(row: dict[str, Any]) -> str:
    def span(pair: Sequence[int]) -> str:
        return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} to {pair[1]:,}"

    words = f"`{row['name']}`: {row['model']}; {row['requests']} requests, prompts of {span(row['prompt'])} tokens, "
    words += f"{span(row['new'])} new ones{' (log-uniform)' if row['log'] else ''}"
    words += f"; beside them a prompt of {row['long_prompt']:,}" if row["long_prompt"] else ""
    return words + (f". Made smaller: {'; '.join(row['scaled'])}" if row["scaled"] else "")


def _table(rows: Sequence[dict[str, Any]], head: Sequence[str], cells: Callable[..., list[list[str]]]) -> list[str]:
    if not rows:
        return []
    lines = ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        for name, held in row["systems"].items():
            lines += ["| " + " | ".join([row["name"], NAMES[name], *line]) + " |" for line in cells(row, name, held)]
    return lines


def _offline(row: dict[str, Any], name: str, held: dict[str, Any]) -> list[list[str]]:
    ratio = row["ratios"].get(name) if row["agrees"] else None
    state = held["steady"] or {}
    step = 1e3 * state["seconds"] / state["steps"] if state else None
    figures = [
        f"{held['seconds']:.2f}",
        _number(held["serving"], ".2f"),
        f"{held['tokens_s']:,.0f}",
        _number(ratio, ".3f"),
        *_spread(held["gap_ms"]),
    ]
    figures += [_number(state.get("rows"), ".0f"), _number(step, ".2f"), _number(state.get("share"), ".2f")]
    return [[*figures, ", ".join(held["said"])]]


def _arrival(row: dict[str, Any], name: str, held: dict[str, Any]) -> list[list[str]]:
    before = _spread(held["alone_ms"])[:1]
    return [[*before, *_spread(held["beside_ms"]), _number(held["slowest"], ".2f"), f"{held['long_first_s']:.2f}"]]


def _load(row: dict[str, Any], name: str, held: dict[str, Any]) -> list[list[str]]:
    lines = []
    for point in held["points"]:
        offered = "all at once" if point["offered"] is None else f"{point['offered']:.2f}"
        lines.append([offered, f"{point['tokens_s']:,.0f}", *_spread(point["gap_ms"]), *_spread(point["first_ms"])])
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _spread(found: dict[str, float] | None) -> list[str]:
    return ["", ""] if found is None else [f"{found['median']:.2f}", f"{found['p99']:.2f}"]


def aimed(row: dict[str, Any]) -> dict[str, tuple[float | None, bool | None]]:
    """By aim: the figure, and whether it is reached; None where it was not measured, or is of something made smaller."""
    ours, found = row["systems"]["ours"], {}
    for name, limit in row["aims"].items():
        value = {"slowest": ours.get("slowest"), "whole_s": row.get("whole_s")}.get(name)
        if name == "share":
            value = (ours["steady"] or {}).get("share")
        elif name.startswith("ours / "):
            value = row["ratios"].get(name.removeprefix("ours / "))
        reached = None if value is None else (value >= limit if name == "share" else value <= limit)
        found[name] = (value, reached)
    return found


def _aims(row: dict[str, Any]) -> str:
    words = []
    for name, (value, reached) in aimed(row).items():
        limit = f"{row['aims'][name]:.3g}"
        if value is not None and row["agrees"]:
            words.append(f"{name} {value:.3g} (aim {limit}: {'reached' if reached else '**missed**'})")
        else:
            words.append(f"{name} not measured (aim {limit})")
    return ", ".join(words) or "no aim"


def briefly(row: dict[str, Any]) -> str:
    """What a run that is cut short leaves behind."""
    words = []
    for name, held in row["systems"].items():
        if row["kind"] == "offline":
            words.append(f"{name} {held['seconds']:.2f} s")
        elif row["kind"] == "arrival":
            words.append(f"{name} p99 {_number(held['slowest'], '.2f')} medians")
        else:
            words.append(f"{name} {held['points'][0]['tokens_s']:.0f} tokens/s")
    return f"{'; '.join(words)}; {_aims(row)}"
