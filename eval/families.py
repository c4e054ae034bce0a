"""Perplexity and parity of every family of text models that is patched, on small models with random weights.

    python -m hf_fastattn.eval.families --output results

Each family's model (`accuracy/random_families.py`) is held against stock by the evaluations of the shipped checkpoint, in
forwards and in the device's loop: with graphs and without, with pages that rows share and without, with pages of earlier
prompts (`prefix_cache`) and without. Limits come from stock's own error in the same dtype. Exits with 1 if a family alarms.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from hf_fastattn.eval import fault_table
from hf_fastattn.eval.accuracy.processes import processes
from hf_fastattn.eval.accuracy.random_families import PREFIX, RANDOM, is_known_here
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.progress import counted

VARIANTS = ("share=off", "share=on", "loop=on,share=off", "loop=on,share=on", "loop=on,share=on,prefix_cache=on")
WITHOUT_GRAPHS = "share=on,cuda_graphs=off"


def variants(on_gpu: bool) -> tuple[str, ...]:
    """What is compared with stock; steps are graphs on a GPU only."""
    return (*VARIANTS, WITHOUT_GRAPHS) if on_gpu else VARIANTS


def measure(family: str, name: str, common: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """What the table keeps of one evaluation of one family: a verdict, and of each variant the check nearest its limit.

    Families that the device's loop does not take are looked at in forwards alone.
    """
    arguments = ["--model", f"{PREFIX}{family}", *common]
    if not _loops(family):
        wanted = [variant for variant in wanted if "loop=on" not in variant]
    record = fault_table.evaluate(name, [*arguments, *(word for one in wanted for word in ("--variant", one))])
    found = fault_table.row(name, record, "", 0, None)
    alarms = [f"{check['variant']}: {check['name']} {check['value']:.3g}" for check in record["checks"] if check["alarms"]]
    reused = [check["note"] for check in record["checks"] if check["name"].startswith("batches that found no pages")]
    return {**found, "family": family, "alarms": alarms, "pages_found": reused}


def _loops(family: str) -> bool:
    """Whether the device's loop takes the family."""
    from hf_fastattn.patches.registry import family_of

    return bool(family_of(family.partition("-")[0]).causal_lm)


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    rows = record["rows"]
    red = [f"{row['family']} ({row['evaluation']})" for row in rows if row["verdict"] != "green"]
    lines = [
        f"# Families: {'red: ' + ', '.join(red) if red else 'green'}",
        "",
        f"Random weights, {record['settings']['dtype']}. A figure is the largest share of a limit that any check of the "
        "variant reached; above 1 it alarms. Limits come from stock's own error, as the reports of the evaluations derive.",
        "",
    ]
    names = list(dict.fromkeys(entry["variant"] for row in rows for entry in row["variants"]))
    lines += ["| family | evaluation | " + " | ".join(names) + " | earlier prompts |", "|" + "---|" * (3 + len(names))]
    for row in rows:
        shares = {entry["variant"]: entry for entry in row["variants"]}
        cells = [_cell(shares.get(name)) for name in names]
        kept = row["pages_found"][0] or "found" if row["pages_found"] else ""
        lines.append(f"| {row['family']} | {row['evaluation']} | " + " | ".join(cells) + f" | {kept} |")
    lines += [f"- {row['family']}, {row['evaluation']}: {alarm}" for row in rows for alarm in row["alarms"]]
    lines += ["", *(f"Not in this release of Transformers: {name}." for name in record["unknown"])]
    lines += [f"{name}: failed with {error}" for name, error in record["failed"]]
    return "\n".join([*lines, "", report.environment_lines(record)])


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['share']:.2f}" + (" **off its path**" if entry["off_path"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; 0 if no family alarms or fails, else 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parser("eval families").parse(argv)
    device = arguments.device or default_device()
    on_gpu = device.startswith("cuda")
    dtype = arguments.dtype if arguments.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    known = [family for family in arguments.families or RANDOM if family not in RANDOM or is_known_here(family)]
    common = ["--device", device, "--dtype", dtype, "--quiet"]
    for name in ("context", "stride", "windows", "batch", "append", "piece", "decode", "threads"):
        value = getattr(arguments, name)
        common += [f"--{name}", str(value)] if value is not None else []
    start, rows, failed = time.perf_counter(), list[dict[str, Any]](), list[tuple[str, str]]()
    with counted(len(known), "families", "family", arguments.quiet) as each:
        for family in known:
            for name in arguments.evaluations:
                try:
                    rows.append(measure(family, name, common, arguments.variant or variants(on_gpu)))
                    if processes().is_first:
                        print(rows[-1], flush=True)
                except Exception as error:
                    # The others are measured nevertheless.
                    failed.append((f"{family}, {name}", f"{type(error).__name__}: {error}"))
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
            each()
    record = {
        "benchmark": "families",
        "command": command("hf_fastattn.eval.families", argv),
        "settings": {"dtype": dtype, "device": device},
        "environment": environment(device),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
        "failed": failed,
        "unknown": [family for family in arguments.families or RANDOM if family not in known],
    }
    report.write(arguments.output, "families", markdown(record), record, None)
    return 1 if failed or any(row["verdict"] != "green" for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
