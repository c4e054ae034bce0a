"""All evaluations of accuracy one after the other, and one table of their verdicts.

    python -m hf_fastattn.eval.all_evaluations --output results

With `--quick` each runs on a set small enough to look at after every change. Exits with 1 if one is red.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from hf_fastattn.eval.accuracy.processes import processes
from hf_fastattn.eval.arguments import COMMANDS, parser
from hf_fastattn.eval.choices import QUICK, WHOLE


class Outcome(NamedTuple):
    """How one evaluation ended."""

    name: str
    verdict: str
    seconds: float


def run(name: str, arguments: Sequence[str]) -> Outcome:
    """Run one evaluation, which prints and writes its own report."""
    start = time.perf_counter()
    status: int = importlib.import_module(COMMANDS[f"eval {name}"].module).main(list(arguments))
    return Outcome(name, "green" if status == 0 else "red", time.perf_counter() - start)


def table(outcomes: Sequence[Outcome]) -> str:
    """The verdicts as Markdown."""
    lines = ["| evaluation | verdict | seconds |", "|---|---|---|"]
    lines += [f"| {one.name} | {one.verdict} | {one.seconds:.0f} |" for one in outcomes]
    return "\n".join([*lines, f"| all | | {sum(one.seconds for one in outcomes):.0f} |"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 if all are green, else 1."""
    arguments = parser("eval all").parse(list(sys.argv[1:] if argv is None else argv))
    common = [] if not arguments.quiet else ["--quiet"]
    for name in ("model", "dtype", "device", "threads", "output"):
        value = getattr(arguments, name)
        common += [f"--{name}", str(value)] if value is not None else []
    sizes = QUICK if arguments.quick else WHOLE
    outcomes = [run(name, [*sizes.get(name, ()), *common]) for name in arguments.evaluations]
    if processes().is_first:
        print(table(outcomes))
    return 0 if all(one.verdict == "green" for one in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
