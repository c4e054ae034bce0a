"""Runs the tests and closes with one line: as usual, then those that need Triton's interpreter, if there are any.

A process with TRITON_INTERPRET=1 cannot compile kernels, so there have to be two. Arguments go to both pytest runs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

NOTHING_COLLECTED = 5
# They may share one GPU.
MOST_WORKERS = 4
# How conftest.py begins the reason of a test that the second run is for.
RUN_BY_THE_OTHER = "needs TRITON_INTERPRET=1"


def run(arguments: list[str], interpret: bool, report: Path) -> int:
    """One pytest run, reported to `report`; returns its exit status."""
    written = [f"--junitxml={report}", "-o", "junit_family=xunit1"]
    command = [sys.executable, "-m", "pytest", "-q", *written, *workers(arguments), *arguments]
    # Models are tiny: threads of processes that tests start would only wait for each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": str(int(interpret))}
    return subprocess.run(command, env=environment).returncode


def workers(arguments: list[str]) -> list[str]:
    """A worker a core if pytest-xdist is there, one more for all tests, of which some wait; or what the arguments say."""
    cores = os.cpu_count() or 1
    if cores == 1 or importlib.util.find_spec("xdist") is None or any(word.startswith("-n") for word in arguments):
        return []
    # Each worker begins with a part of the list of its own, so that what a file's tests share is made once.
    return ["-n", str(min(cores + (not arguments), MOST_WORKERS)), "--dist", "worksteal"]


def count(report: Path) -> tuple[Counter[str], Counter[str], set[str]]:
    """How many passed, failed, were skipped; how many were skipped for which reason; files with tests of the other run."""
    outcomes, reasons, left = Counter[str](), Counter[str](), set[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes["failed"] += 1
        elif skipped is None:
            outcomes["passed"] += 1
        elif skipped.get("message", "").startswith(RUN_BY_THE_OTHER):
            left.add(case.get("file", ""))
        else:
            outcomes["skipped"] += 1
            reasons[skipped.get("message", "")] += 1
    return outcomes, reasons, left


def main(arguments: list[str]) -> int:
    started = time.monotonic()
    outcomes, reasons, statuses = Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        for interpret in (False, True):
            report = Path(folder, f"{interpret}.xml")
            statuses.append(run(arguments, interpret, report))
            if report.exists():
                *counted, left = count(report)
                for total, part in zip((outcomes, reasons), counted, strict=True):
                    total.update(part)
                if not left:
                    break
                # Nothing was asked for by name: the second run need not import the files that have nothing for it.
                arguments = arguments or sorted(left)
    parts = [f"{outcome} {outcomes[outcome]}" for outcome in ("failed", "passed", "skipped") if outcomes[outcome]]
    if reasons:
        parts[-1] += f" ({', '.join(f'{number}: {reason}' for reason, number in reasons.items())})"
    print(", ".join([*parts, f"in {time.monotonic() - started:.0f} s"]))
    if all(status == NOTHING_COLLECTED for status in statuses):
        return NOTHING_COLLECTED
    return next((status for status in statuses if status not in (0, NOTHING_COLLECTED)), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
