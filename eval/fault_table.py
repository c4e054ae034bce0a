"""Whether the evaluations can fail, and fail only when they should: every fault against both, and seeds without one.

    python -m hf_fastattn.eval.fault_table --seeds 20 --output results

Each fault of `faults.py` is planted in turn, and `perplexity` and `parity` must both turn red. Then both run without a
fault over several seeds, which draw other windows, on the checkpoint as it is and as a Mistral with a window, and must
stay green. Exits with 1 if a fault was missed or a seed alarmed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from hf_fastattn.eval import models, parity, perplexity
from hf_fastattn.eval.accuracy import options
from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.choices import WINDOWS_16, WINDOWS_32
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment
from hf_fastattn.eval.reporting.plots import draw_faults
from hf_fastattn.eval.reporting.progress import bar

EVALUATIONS = ("perplexity", "parity")
# More than the largest page that the default variants have.
WINDOW = 96
NEW_TOKENS = "16"


def evaluate(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The record of one evaluation, run with these arguments."""
    made = parser(f"eval {name}")
    # Whoever reads an error called this command.
    made.prog = "hf-fastattn eval faults"
    defaults = ["--windows", str(WINDOWS_32), *(("--new", NEW_TOKENS) if name == "parity" else ())]
    parsed, setup = options.set_up(name, made, [*defaults, *arguments])
    return perplexity.run(setup) if name == "perplexity" else parity.run(setup, parsed.new)


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
    run = {"evaluation": name, "fault": fault, "seed": seed, "window": window}
    return {**run, "verdict": record["verdict"], "variants": variants}


def _share(check: dict[str, Any]) -> float:
    share = check["value"] / check["limit"]
    return share if share == share else float("inf")


def _alarms(check: dict[str, Any]) -> bool:
    return bool(check["alarms"])


def caught(found: dict[str, Any]) -> bool:
    """Whether every variant alarmed, and not for having left the paged path."""
    return all(entry["caught_by"] and not entry["off_path"] for entry in found["variants"])


def run(common: Sequence[str], seeds: int, faults: Sequence[str], quiet: bool) -> list[dict[str, Any]]:
    """All runs: each fault once, then the seeds without a fault."""
    plan: list[tuple[str, str, int, int | None]] = []
    for fault in faults:
        plan += [(name, fault, 0, WINDOW if fault == "window" else None) for name in EVALUATIONS]
    for seed in range(seeds):
        plan += [(name, "", seed, window) for window in (None, WINDOW) for name in EVALUATIONS]
    rows = []
    for name, fault, seed, window in bar(plan, "faults and seeds", "run", quiet):
        arguments = [*common, "--seed", str(seed), "--quiet"]
        arguments += ["--inject", fault] if fault else []
        arguments += ["--window", str(window)] if window else []
        rows.append(row(name, evaluate(name, arguments), fault, seed, window))
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    planted = [found for found in record["rows"] if found["fault"]]
    clean = [found for found in record["rows"] if not found["fault"]]
    missed = [f"{found['fault']} by {found['evaluation']}" for found in planted if not caught(found)]
    alarms = [f"{found['evaluation']} with seed {found['seed']}" for found in clean if found["verdict"] != "green"]
    lines = [
        "# Faults, and seeds without one",
        "",
        f"Faults: {'all caught by both evaluations' if not missed else 'MISSED: ' + ', '.join(missed)}. "
        f"Without a fault: {len(alarms)} alarms in {len(clean)} runs{': ' + ', '.join(alarms) if alarms else ''}.",
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
    try:
        # Before the progress bar, which would stand in the line of the error.
        models.check(arguments.model or str(models.SHIPPED))
    except ValueError as error:
        made.error(str(error))
    arguments.device = arguments.device or default_device()
    if arguments.windows is None:
        single = arguments.dtype == "float32" or (arguments.dtype == "auto" and not arguments.device.startswith("cuda"))
        arguments.windows = WINDOWS_32 if single else WINDOWS_16
    common = []
    for name in ("context", "stride", "windows", "dtype", "device", "model"):
        common += [f"--{name}", str(getattr(arguments, name))] if getattr(arguments, name) is not None else []
    common += [word for variant in arguments.variant or () for word in ("--variant", variant)]
    start = time.perf_counter()
    # Before the runs: the files may change under a long one, the modules in memory do not.
    where = environment(arguments.device)
    rows = run(common, arguments.seeds, arguments.faults, arguments.quiet)
    record = {
        "evaluation": "faults",
        "command": command("hf_fastattn.eval.fault_table", argv),
        "settings": {key: str(value) for key, value in vars(arguments).items() if key not in ("output", "quiet")},
        "environment": where,
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    report.write(arguments.output, "faults", markdown(record), record, lambda plt: draw_faults(plt, record))
    right = all(caught(found) if found["fault"] else found["verdict"] == "green" for found in rows)
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
