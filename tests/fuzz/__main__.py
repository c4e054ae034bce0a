"""Random programs of `generate()` on a stock and a patched model: `python -m tests.fuzz --programs 1000`.

Prints each program on which the two differ, shrunk to what is needed, and at the end which paths and reasons came up.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter

import torch

from tests.fuzz.draw import draw
from tests.fuzz.run import is_rounding, run_program
from tests.fuzz.shrink import shrink


def main() -> int:
    """The exit status: 1 if a program differed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=100, help="how many, from --seed on")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most")
    parser.add_argument("--no-shrink", action="store_true", help="print programs as they were drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end, reasons, paths, failed, done = time.monotonic() + 60 * arguments.minutes, Counter[str](), Counter[str](), 0, 0
    for seed in range(arguments.seed, arguments.seed + arguments.programs):
        if time.monotonic() > end:
            break
        program = draw(seed)
        result = run_program(program)
        done += 1
        for path in result.paths:
            paths["paged" if path["forwards"] else "stock"] += 1
            paths["the device's loop"] += path["loops"]
            paths["shared pages"] += path["shared"]
            reasons.update(path["fallbacks"])
        if result.problem is not None and not is_rounding(program):
            failed += 1
            smaller = program if arguments.no_shrink else shrink(program)
            print(f"seed {seed}, step {result.step}: {result.problem}\n  {json.dumps(smaller)}", flush=True)
    print(f"{done} programs, {failed} differ; steps: {dict(paths)}")
    for reason, count in reasons.most_common():
        print(f"{count:>6}  {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
