"""Whether the evaluations can fail, and fail only when they should: every fault against each, and seeds without one.

    python -m hf_fastattn.eval.fault_table --seeds 20 --output results

Each fault is planted in turn, those of `faults.py` in hooks, those of `step_faults.py` in what recorded steps read, and at
least two evaluations must turn red. Then all run without a fault over several seeds, which draw other windows, in turn on
the checkpoint as it is and as a Mistral with a window, and must stay green. With `--output` runs that have ended are kept as
they come, and one of the same code and options goes on from them. Exits with 1 if a fault was missed or a seed alarmed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hf_fastattn.eval import logprobs, models, parity, perplexity
from hf_fastattn.eval.accuracy import options
from hf_fastattn.eval.accuracy.journal import Journal
from hf_fastattn.eval.accuracy.noticed import caught, missed
from hf_fastattn.eval.accuracy.options import Setup
from hf_fastattn.eval.accuracy.processes import measured, processes
from hf_fastattn.eval.accuracy.stock_parts import StockParts
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.choices import FAULTS, FORMAT_FAULTS, MIXTURE, STEP_FAULTS, WINDOWS_16, WINDOWS_32
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment, settings_hash
from hf_fastattn.eval.reporting.plots import draw_faults
from hf_fastattn.eval.reporting.progress import counted

# What runs each evaluation, from its parsed options and what they set up, and its options beside the common ones.
EVALUATIONS: dict[str, tuple[Callable[[Any, Setup], dict[str, Any]], tuple[str, ...]]] = {
    "perplexity": (lambda parsed, setup: perplexity.run(setup), ()),
    "parity": (lambda parsed, setup: parity.run(setup, parsed.new), ("--new", "16")),
    "logprobs": (
        lambda parsed, setup: logprobs.run(setup, parsed.new, parsed.samples, parsed.top_k),
        ("--new", "16", "--samples", "4"),
    ),
}
# More than the largest page that the default variants have; less where rows are no longer than that.
WINDOW = 96


def evaluate(name: str, arguments: Sequence[str], stock_parts: StockParts | None = None) -> dict[str, Any]:
    """The record of one evaluation, run with these arguments; what is kept of stock is not measured again."""
    made = parser(f"eval {name}")
    # Whoever reads an error called this command.
    made.prog = "hf-fastattn eval faults"
    run_it, own = EVALUATIONS[name]
    parsed, setup = options.set_up(name, made, ["--windows", str(WINDOWS_32), *own, *arguments], stock_parts)
    return run_it(parsed, setup)


def row(name: str, record: dict[str, Any], fault: str, seed: int, window: int | None) -> dict[str, Any]:
    """What the table keeps of a run: its verdict, and for each variant the check nearest to or furthest beyond its limit."""
    variants = []
    for variant in record["variants"]:
        checks = [check for check in record["checks"] if check["variant"] == variant and check["limit"] > 0]
        worst = max(checks, key=_share)
        path = [check for check in record["checks"] if check["variant"] == variant and check["limit"] == 0]
        entry = {"variant": variant, **worst, "share": _share(worst), "checks": len(checks)}
        entry |= {"caught_by": sum(map(_alarms, checks)), "off_path": any(map(_alarms, path))}
        if name == "perplexity":
            ours = next(r for r in record["series"] if r["series"] == variant)
            stock = next(r for r in record["series"] if r["series"] == "stock")
            entry["difference"], entry["loss_se"] = ours["difference"], stock["loss_se"]
        entry["first"] = record.get("first_wrong", {}).get(variant, "")
        variants.append(entry)
    run = {"evaluation": name, "fault": fault, "seed": seed, "window": window, "planted": record["planted"]}
    return {**run, "verdict": record["verdict"], "variants": variants}


def _share(check: dict[str, Any]) -> float:
    share = check["value"] / check["limit"]
    return share if share == share else float("inf")


def _alarms(check: dict[str, Any]) -> bool:
    return bool(check["alarms"])


def run(
    common: Sequence[str],
    seeds: int,
    faults: Sequence[str],
    quiet: bool,
    names: Sequence[str],
    context: int,
    journal: Journal,
) -> list[dict[str, Any]]:
    """All runs of the evaluations `names`: each fault once, then the seeds without a fault; those that the journal lacks."""
    window = min(WINDOW, 3 * context // 4)
    plan: list[tuple[str, str, int, int | None]] = []
    for fault in faults:
        plan += [(name, fault, 0, window if fault == "window" else None) for name in names]
    for seed in range(seeds):
        plan += [(name, "", seed, window if seed % 2 else None) for name in names]

    stock_parts = StockParts()

    def measure(part: tuple[str, str, int, int | None]) -> dict[str, Any]:
        name, fault, seed, window = part
        arguments = [*common, "--seed", str(seed), "--quiet"]
        arguments += ["--inject", fault] if fault else []
        arguments += ["--window", str(window)] if window else []
        # The last option counts.
        arguments += ["--model", str(MIXTURE)] if fault == "step-expert" and MIXTURE.exists() else []
        # Faults are planted in the texts of the first seed.
        kept = stock_parts if seed == 0 else None
        return row(name, evaluate(name, arguments, kept), fault, seed, window)

    with counted(len(plan), "faults and seeds", "run", quiet) as each:
        return measured(plan, measure, journal, each)


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    planted = [found for found in record["rows"] if found["fault"]]
    clean = [found for found in record["rows"] if not found["fault"]]
    lost = missed(record["rows"])
    alarms = [f"{found['evaluation']} with seed {found['seed']}" for found in clean if found["verdict"] != "green"]
    lines = [
        "# Faults, and seeds without one",
        "",
        f"Faults: {'MISSED: ' + ', '.join(lost) if lost else 'all caught by two evaluations or more'}. "
        f"Without a fault: {len(alarms)} alarms in {len(clean)} runs{': ' + ', '.join(alarms) if alarms else ''}.",
        "",
        *_grid(planted),
        "",
        "| fault | evaluation | variant | caught | by checks | furthest beyond its limit | value | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in planted:
        for entry in found["variants"]:
            lines.append(
                f"| {found['fault']} | {found['evaluation']} | {entry['variant']} "
                f"| {'yes' if entry['caught_by'] else '**no**'} | {entry['caught_by']} of {entry['checks']} "
                f"| {entry['name']} | {entry['value']:.2g} | {entry['limit']:.2g} |"
            )
    lines += ["", "What a perplexity without pairing would have seen of them, in nats a token:", ""]
    lines += ["| fault | variant | mean change | its share of the sampling error |", "|---|---|---|---|"]
    for found in planted:
        for entry in found["variants"] if found["evaluation"] == "perplexity" else ():
            share = abs(entry["difference"]) / entry["loss_se"]
            change = f"{entry['difference']:+.1e} | {share:.2g} standard errors"
            lines.append(f"| {found['fault']} | {entry['variant']} | {change} |")
    lines += ["", "Where `parity` says that they begin (the faults are in all layers):", ""]
    for found in planted:
        for entry in found["variants"]:
            lines += [f"- {found['fault']}, {entry['variant']}: {entry['first']}"] if entry["first"] else []
    if clean:
        lines += ["", "Without a fault, the largest share of a limit that any check reached (1 alarms):", ""]
        lines += [
            "| evaluation | check nearest its limit | largest share | of so many runs and variants |",
            "|---|---|---|---|",
        ]
        lines += _largest_shares(clean)
    lines += ["", report.environment_lines(record)]
    return "\n".join(lines)


def _grid(planted: Sequence[dict[str, Any]]) -> list[str]:
    """Faults by evaluation: how far beyond its limit the worst check of the variant that shows it least is."""
    names = [name for name in EVALUATIONS if any(found["evaluation"] == name for found in planted)]
    lines = ["| fault | what it is | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for fault in dict.fromkeys(found["fault"] for found in planted):
        cells = []
        for name in names:
            found = next((run for run in planted if (run["fault"], run["evaluation"]) == (fault, name)), None)
            cells.append("" if found is None else _cell(found))
        lines.append(f"| {fault} | {STEP_FAULTS.get(fault, 'planted in hooks')} | " + " | ".join(cells) + " |")
    return lines


def _cell(found: dict[str, Any]) -> str:
    if not found["planted"]:
        return "not in force"
    least = min(entry["share"] for entry in found["variants"])
    return f"caught, {least:.2g} x its limit" if caught(found) else f"**missed**, {least:.2g}"


def _largest_shares(clean: Sequence[dict[str, Any]]) -> list[str]:
    entries = [(found["evaluation"], entry) for found in clean for entry in found["variants"]]
    lines = []
    for key in sorted({(evaluation, entry["name"]) for evaluation, entry in entries}):
        shares = [entry["share"] for evaluation, entry in entries if (evaluation, entry["name"]) == key]
        runs = sum(evaluation == key[0] for evaluation, _ in entries)
        lines.append(f"| {key[0]} | {key[1]} | {max(shares):.2f} | {len(shares)} of {runs} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything; 0 if every fault was caught and no seed alarmed, else 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser("eval faults")
    arguments = made.parse(argv)
    if arguments.kv_dtype is None and set(arguments.faults or ()) & set(FORMAT_FAULTS):
        made.error(f"argument --faults: {', '.join(FORMAT_FAULTS)} needs 8-bit keys and values; give --kv-dtype")
    try:
        # Before the progress bar, which would stand in the line of the error.
        models.check(arguments.model or str(models.SHIPPED))
    except ValueError as error:
        made.error(str(error))
    arguments.device = arguments.device or default_device()
    if arguments.windows is None:
        single = arguments.dtype == "float32" or (arguments.dtype == "auto" and not arguments.device.startswith("cuda"))
        arguments.windows = WINDOWS_32 if single else WINDOWS_16
    if arguments.faults is None:
        arguments.faults = [*FAULTS, *(FORMAT_FAULTS if arguments.kv_dtype else ()), *STEP_FAULTS]
    common = []
    sizes = ("context", "stride", "windows", "append", "piece", "decode")
    for name in (*sizes, "dtype", "device", "model", "kv_dtype", "threads"):
        value = getattr(arguments, name)
        common += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    common += [word for variant in arguments.variant or () for word in ("--variant", variant)]
    start = time.perf_counter()
    # Before the runs: the files may change under a long one, the modules in memory do not.
    where = environment(arguments.device)
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("output", "quiet")}
    key = settings_hash({**settings, "environment": where})
    kept = arguments.output is not None and processes().is_first
    journal = Journal(arguments.output / ".journal" / f"faults-{key}.jsonl" if kept else None, settings)
    rows = run(common, arguments.seeds, arguments.faults, arguments.quiet, arguments.evaluations, arguments.context, journal)
    record = {
        "evaluation": "faults",
        "command": command("hf_fastattn.eval.fault_table", argv),
        "settings": settings,
        "environment": where,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    report.write(arguments.output, "faults", markdown(record), record, lambda plt: draw_faults(plt, record))
    right = not missed(rows) and all(found["fault"] or found["verdict"] == "green" for found in rows)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
