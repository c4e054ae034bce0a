"""Random programs of `generate()` on a stock and a patched model: `python -m tests.fuzz --programs 1000`.

Prints each program on which the two differ, shrunk to what is needed, and at the end which paths and reasons came up.
`--package` tries another checkout of hf_fastattn, and `--paths` writes which path every program took, to compare two.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch


def main() -> int:
    """The exit status: 1 if a program differed."""
    arguments = _arguments()
    if arguments.package is not None:
        _import_from(arguments.package)
    torch.set_num_threads(1)
    logging.getLogger("hf_fastattn").setLevel(logging.ERROR)
    failed, paths, total = run_all(arguments)
    if arguments.paths is not None:
        arguments.paths.write_text(json.dumps(paths, indent=0))
    steps = [step for program in paths.values() for step in program["paths"]]
    print(f"{total} programs, {failed} differ, {len(steps)} steps with a patched model")
    for name, count in _counts(steps).most_common():
        print(f"{count:>6}  {name}")
    return 1 if failed else 0


def run_all(arguments: argparse.Namespace) -> tuple[int, dict[str, Any], int]:
    """How many programs differed, the paths of each by its seed, and how many ran."""
    # Not before the package was chosen.
    from tests.fuzz.draw import draw, is_plain
    from tests.fuzz.run import is_excused, run_program
    from tests.fuzz.shrink import as_line, shrink

    end, failed = time.monotonic() + 60 * arguments.minutes, 0
    paths: dict[str, Any] = {}
    one = None if arguments.program is None else json.loads(arguments.program)
    for seed in range(arguments.seed, arguments.seed + (1 if one else arguments.programs)):
        if time.monotonic() > end:
            break
        program = one or draw(seed)
        result = run_program(program, check_reasons=arguments.package is None)
        paths[str(seed)] = {"plain": is_plain(program), "problem": result.problem, "paths": result.paths}
        if result.problem is not None and not is_excused(program):
            failed += 1
            smaller = program if arguments.no_shrink or one else shrink(program)
            print(f"seed {seed}, step {result.step}: {result.problem}\n  {as_line(smaller)}", flush=True)
    return failed, paths, len(paths)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=100, help="how many, from --seed on")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--program", help="this one alone, as JSON")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most")
    parser.add_argument("--no-shrink", action="store_true", help="print programs as they were drawn")
    parser.add_argument("--paths", type=Path, help="write the paths of every program to this file, as JSON")
    parser.add_argument("--package", type=Path, help="a checkout whose hf_fastattn is tried instead of this one")
    return parser.parse_args()


def _import_from(checkout: Path) -> None:
    sys.path.insert(0, str(checkout.resolve()))
    importlib.import_module("hf_fastattn")
    # The tests are this checkout's.
    del sys.path[0]


def _counts(steps: list[dict[str, Any]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for step in steps:
        counts["steps with paged forwards" if step["forwards"] else "steps without"] += 1
        counts["loops of the device"] += step["loops"]
        counts["steps that shared pages"] += step["shared"]
        counts.update({f"reason: {reason}": count for reason, count in step["fallbacks"].items()})
    return counts


if __name__ == "__main__":
    sys.exit(main())
