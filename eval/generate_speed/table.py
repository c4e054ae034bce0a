"""The report of the `generate()` benchmark in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_fastattn.eval.choices import KINDS
from hf_fastattn.eval.generate_speed.targets import NAMES, TARGETS, targets
from hf_fastattn.eval.reporting.report import environment_lines

HEAD = (
    "case",
    "system",
    "first token, ms",
    "a token, ms",
    "tokens/s",
    "whole call, s",
    "peak, GB",
    "read limit, ms",
    "share of it",
    "first call, s",
    "patched / it, first token",
    "a token",
)
COUNTS = ("forwards", "graphs_replayed", "graphs_captured", "appends_replayed", "prompt_tokens")
NOTES = """First token: a whole call of one token. A token: the difference between calls of 1 + `new` tokens and of one, over
`new`; whole calls, the device idle before and after each. Whole call: 1 + `new` tokens, put together from the two. Ratios:
medians of interleaved pairs, patched over the other. Read limit: a step that reads each weight it needs, and the keys and
values of the rows that go on, once, at the speed of reading measured here. First call: of a case, in a model that was just
patched (or not yet compiled), with the kernels that earlier cases have compiled; peak memory is taken there."""
EXPERTS = """Experts of a layer that a step reads, counted on the device over a whole call: the mean of all layers, the least
of any layer, and what is expected of rows that choose any experts alike, E (1 - (1 - K / E) ^ rows). The read limit is that
of the counted ones. With less than 0.9 of the expected number a run is not comparable: its rows route alike."""


def is_green(row: dict[str, Any]) -> bool:
    """The case agreed with stock, ran on our path, and read about as many experts as other prompts would."""
    return bool(row["agrees"]) and not row["problems"] and is_comparable(row)


def is_comparable(row: dict[str, Any]) -> bool:
    """The case's rows did not route alike."""
    # Records of before experts were counted have no such entry.
    experts = row.get("experts")
    return experts is None or bool(experts["comparable"])


def markdown(record: dict[str, Any]) -> str:
    """The whole report."""
    settings = record["settings"]
    lines = ["# model.generate()", "", environment_lines(record), ""]
    patch = ", ".join(f"{name}={value}" for name, value in settings["patch"].items())
    lines.append(f"Model: {settings['model']}, {settings['dtype']}; options of `patch`: {patch}.")
    if record["read_tbs"] is not None:
        lines.append(f"Speed of reading memory, measured: {record['read_tbs']:.3g} TB/s.")
    first = next((row for row in record["cases"] if row["process_first_call_s"] is not None), None)
    if first is not None:
        seconds, case = first["process_first_call_s"], f"{first['kind']} {first['name']}"
        lines.append(
            f"The patched model's first call in this process, before anything else: {seconds:.2f} s ({case}); kernels"
        )
        lines.append("that Triton's cache on disk holds from earlier processes are not compiled anew.")
    lines += ["", NOTES]
    for kind in dict.fromkeys(row["kind"] for row in record["cases"]):
        rows = [row for row in record["cases"] if row["kind"] == kind]
        lines += ["", f"### {kind}: {KINDS[kind]}", "", speed_table(rows)]
        over = [(row["name"], row["first_over_one_sample"]) for row in rows if row["first_over_one_sample"] is not None]
        if over:
            lines += [
                "",
                "First token over that of one sample: " + ", ".join(f"{n}: {value:.2f}" for n, value in over) + ".",
            ]
    if record["cases"]:
        lines += ["", "### Checks and counters of the patched model's last whole call", "", check_table(record["cases"])]
    mixed = [row for row in record["cases"] if row["experts"] is not None]
    if mixed:
        lines += ["", "### Distinct experts a layer and step", "", EXPERTS, "", expert_table(mixed)]
    if settings["shape"] in TARGETS and record["cases"]:
        lines += [
            "",
            "### Against the targets, which were set for an H200",
            "",
            target_table(record["cases"], settings["shape"]),
        ]
    lines += [f"\n**{failed['case']} failed**: {failed['error']}" for failed in record["failed"]]
    for profile in record["profiles"]:
        lines += ["", f"### A step of {profile['rows']} x {profile['prompt']}, by kernel", "", profile_table(profile)]
    return "\n".join(lines)


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each case and system."""
    lines = [_line(HEAD), "|" + "---|" * len(HEAD)]
    for row in rows:
        for system, found in row["systems"].items():
            compared = row["ratios"].get(system, {})
            cells = [f"{found['first_ms']:.1f}", f"{found['token_ms']:.2f}", f"{found['tokens_per_s']:.0f}"]
            cells += [f"{found['call_s']:.2f} ({1 + found['new']})", _cell(found["peak_gb"], 1), _cell(found["limit_ms"], 2)]
            cells += [_cell(found["share_of_limit"], 2), _cell(found["first_call_s"], 2)]
            if system != "patched":
                missing = "RED" if is_comparable(row) else "not comparable"
                cells += [f"{compared[name]:.2f}" if compared else missing for name in ("first", "token")]
            else:
                cells += ["", ""]
            lines.append(_line((row["name"], system, *cells)))
    return "\n".join(lines)


def check_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each case: agreement, path and counters."""
    names = "forwards | steps replayed | captured | prompts replayed | prompt tokens | pages allocated, shared"
    lines = [f"| case | agreement | path | loop | {names} |", "|" + "---|" * 10]
    for row in rows:
        call = row["counters"]
        agreement = ("yes" if row["agrees"] else "**RED**") + f": {row['detail']}"
        if row["checked"] != row["name"]:
            agreement += f" (checked for {row['checked']})"
        path = "**RED**: " + "; ".join(row["problems"]) if row["problems"] else "paged, no fallback"
        loop = "on the device" if call["fast_loops"] else "Transformers'"
        counts = [call[name] for name in COUNTS]
        pages = f"{call['pages_allocated']}, {call['pages_shared']}"
        lines.append(_line((f"{row['kind']} {row['name']}", agreement, path, loop, *map(str, counts), pages)))
    return "\n".join(lines)


def expert_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each case of a model with experts."""
    lines = ["| case | counted | fewest in a layer | expected | counted / expected | |", "|" + "---|" * 6]
    for row in rows:
        found = row["experts"]
        figures = [f"{found[name]:.1f}" for name in ("counted", "least", "expected")]
        state = "" if found["comparable"] else "**not comparable**"
        share = f"{found['counted'] / found['expected']:.2f}"
        lines.append(_line((f"{row['kind']} {row['name']}", *figures, share, state)))
    return "\n".join(lines)


def target_table(rows: Sequence[dict[str, Any]], shape: str) -> str:
    """Bars and aims beside what was reached; nothing is reached by a red case."""
    lines = ["| case | figure | patched | bar | aim | |", "|---|---|---|---|---|---|"]
    for row in rows:
        for target in targets(row, shape):
            state = target.state if is_green(row) else "RED"
            values = (f"{target.value:.4g}", f"{target.bar:g}", f"{target.aim:g}")
            lines.append(_line((f"{row['kind']} {row['name']}", NAMES[target.figure], *values, state)))
    return "\n".join(lines)


def profile_table(profile: dict[str, Any]) -> str:
    """Kernels by their share of a step, the rest, and what lies between them."""
    lines = ["| us a step | launches | kernel |", "|---|---|---|"]
    lines += [f"| {found['us']:.1f} | {found['launches']:.1f} | `{found['name']}` |" for found in profile["kernels"]]
    lines.append(f"| {profile['other_us']:.1f} | {profile['other_launches']:.1f} | all others |")
    total, step = profile["sum_us"], profile["step_us"]
    lines.append(f"| {total:.1f} | | sum |")
    lines.append(f"| {step - total:.1f} | | gaps: the step's {step:.1f} less the sum, below 0 where kernels overlap |")
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
