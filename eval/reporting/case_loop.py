"""Cases of a benchmark one after the other: one that fails is named, and the next one goes on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]


def measured_cases(
    cases: Iterable[tuple[str, Callable[[], Row]]], briefly: Callable[[Row], str], start: float
) -> tuple[list[Row], list[Row]]:
    """The rows of a table, and `{"name", "error"}` of each case that failed; a line is printed as each ends.

    Args:
        cases: name and what measures it; a row has what is wrong with it under "red".
        briefly: figures of a row in a few words, which a run that is cut short leaves behind.
        start: of the run, by `time.perf_counter`.
    """
    rows: list[Row] = []
    failed: list[Row] = []
    for name, measure in cases:
        try:
            rows.append({"name": name, **measure()})
            said = f"{', '.join(rows[-1]['red']) or 'green'}; {briefly(rows[-1])}"
        except Exception as error:
            traceback.print_exc()
            failed.append({"name": name, "error": f"{type(error).__name__}: {error}"})
            said = "FAILED"
        print(f"{time.perf_counter() - start:6.1f} s  {name}: {said}", flush=True)
    return rows, failed
