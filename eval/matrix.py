"""Small cases of every kind of call, family and state: nothing that a user does may be slower or larger than stock.

    python -m hf_fastattn.eval.matrix --output results
    python -m hf_fastattn.eval.matrix --cell 'llama/*/greedy' '*/bf16+lora/*'

A cell is measured by itself: one that raises is named and the others go on. The exit status is 1 if a cell is red or
failed; cells that need a package which is not installed are skipped, and say so.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from hf_fastattn.eval.arguments import parser
from hf_fastattn.eval.matrix_cells.cells import Cell, choose
from hf_fastattn.eval.matrix_cells.measure import SLOWER, measure
from hf_fastattn.eval.matrix_cells.table import markdown
from hf_fastattn.eval.reporting import report
from hf_fastattn.eval.reporting.environment import command, default_device, environment

# (tokens after the first, pairs), by device; and of a quick run.
STANDARD = {"cuda": (32, 5), "cpu": (24, 5)}
QUICK = (4, 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a cell was red or failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    made = parser("bench matrix")
    options = made.parse(argv)
    device = torch.device(options.device or default_device())
    standard = QUICK if options.quick else STANDARD.get(device.type)
    if device.type not in SLOWER or standard is None:
        made.error(f"argument --device: must be cuda or cpu, got {options.device}")
    try:
        cells = choose(options.cell, options.quick)
    except ValueError as error:
        made.error(str(error))
    new, pairs = options.new or standard[0], options.pairs or standard[1]
    start = time.perf_counter()
    record = _measure(cells, device, new, pairs)
    record = {
        "command": command("hf_fastattn.eval.matrix", argv),
        "environment": environment(device),
        "settings": {"new": new, "pairs": pairs, "slower": SLOWER[device.type]},
        "seconds": time.perf_counter() - start,
        **record,
    }
    report.write(options.output, f"matrix-{_short_name(device)}", markdown(record), record, None)
    print(json.dumps(report.finite(record)))
    return 1 if record["failed"] or any(row["red"] for row in record["cells"]) else 0


def _measure(cells: Sequence[Cell], device: torch.device, new: int, pairs: int) -> dict[str, Any]:
    found: dict[str, Any] = {"cells": [], "failed": [], "skipped": []}
    for cell in cells:
        start = time.perf_counter()
        try:
            row = measure(cell, device, new, pairs, {"cuda_graphs": device.type == "cuda"})
        except ImportError as error:
            found["skipped"].append({"cell": cell.name, "error": str(error)})
            said = f"skipped: {error}"
        except Exception as error:
            traceback.print_exc()
            found["failed"].append({"cell": cell.name, "error": f"{type(error).__name__}: {error}"})
            said = f"FAILED: {error}"
        else:
            found["cells"].append(row)
            said = f"first {row['ratios']['first']:.2f}, a token {row['ratios']['token']:.2f}"
            said += f"  RED: {'; '.join(row['red'])}" if row["red"] else ""
            said += f"  allowed: {row['allowed']}" if row["allowed"] else ""
            said += f"  ({row['path']})"
        print(f"{time.perf_counter() - start:6.1f} s  {cell.name}: {said}", flush=True)
    return found


def _short_name(device: torch.device) -> str:
    return device.type if device.type == "cpu" else torch.cuda.get_device_name(device).split()[-1].lower()


if __name__ == "__main__":
    raise SystemExit(main())
