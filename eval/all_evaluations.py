"""All evaluations of accuracy one after the other, and one table of their verdicts.

    python -m hf_fastattn.eval.all_evaluations --output results

With `--quick` each runs on a set small enough to look at after every change. The table is written anew after each, so that a
run that is stopped leaves what it has found. Exits with 1 if one is red. What needs a package that is not installed is not
run, which the table says.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from hf_fastattn.eval.arguments import COMMANDS, parser
from hf_fastattn.eval.choices import QUICK, WHOLE, WINDOWS_16
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment

# What an evaluation imports beside the project's own requirements.
NEEDS = {"tasks": "lm_eval"}
RED = "red"


class Outcome(NamedTuple):
    """How one evaluation ended."""

    name: str
    verdict: str
    seconds: float
    cpu_seconds: float


def run(name: str, arguments: Sequence[str]) -> Outcome:
    """Run one evaluation, which prints and writes its own report."""
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return Outcome(name, f"not run: {package} is not installed", 0.0, 0.0)
    start, cpu = time.perf_counter(), time.process_time()
    status: int = importlib.import_module(COMMANDS[f"eval {name}"].module).main(list(arguments))
    return Outcome(name, "green" if status == 0 else RED, time.perf_counter() - start, time.process_time() - cpu)


def table(outcomes: Sequence[Outcome]) -> str:
    """The verdicts as Markdown."""
    lines = ["| evaluation | verdict | seconds | of the CPU |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {one.verdict} | {one.seconds:.0f} | {one.cpu_seconds:.0f} |" for one in outcomes]
    whole = [sum(times) for times in zip(*((one.seconds, one.cpu_seconds) for one in outcomes), strict=True)] or [0.0, 0.0]
    return "\n".join([*lines, f"| all | | {whole[0]:.0f} | {whole[1]:.0f} |"])


def markdown(record: dict[str, Any]) -> str:
    """The report."""
    outcomes = [Outcome(**one) for one in record["outcomes"]]
    title = f"# All evaluations: {record['verdict']}"
    missing = [f"Not run: {', '.join(record['missing'])}.", ""] * bool(record["missing"])
    return "\n".join([title, "", table(outcomes), "", *missing, report.environment_lines(record)])


def sizes(name: str, quick: bool, in_16_bits: bool) -> tuple[str, ...]:
    """The options that say how much an evaluation looks at."""
    if quick:
        return QUICK[name]
    more = in_16_bits and "--windows" in WHOLE[name]
    # The last option counts: rounding in 16 bits is told from faults on many windows only.
    return (*WHOLE[name], *(("--windows", str(WINDOWS_16)) if more else ()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 if none is red, else 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parser("eval all").parse(argv)
    device = arguments.device or default_device()
    on_gpu = device.startswith("cuda")
    in_16_bits = arguments.dtype in ("bfloat16", "float16") or (arguments.dtype == "auto" and on_gpu)
    common = [] if not arguments.quiet else ["--quiet"]
    for name in ("model", "dtype", "device", "threads", "output"):
        value = getattr(arguments, name)
        # What `auto` is differs: draws are tested in fp32 everywhere.
        common += [f"--{name}", str(value)] if value not in (None, "auto") else []
    outcomes: list[Outcome] = []
    record: dict[str, Any] = {}
    for place, name in enumerate(arguments.evaluations, 1):
        outcomes.append(run(name, [*sizes(name, arguments.quick, in_16_bits), *common]))
        # Anew: an evaluation sets the threads.
        record = {
            "evaluation": "all",
            "command": command("hf_fastattn.eval.all_evaluations", argv),
            "environment": environment(device),
            "outcomes": [one._asdict() for one in outcomes],
            "missing": arguments.evaluations[place:],
            "verdict": RED if any(one.verdict == RED for one in outcomes) else "green",
        }
        report.save(arguments.output, "all", markdown(record), record)
    report.write(arguments.output, "all", markdown(record), record, None)
    return 0 if record["verdict"] == "green" else 1


if __name__ == "__main__":
    raise SystemExit(main())
