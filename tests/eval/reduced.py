"""The evaluations on a set small enough for every test run."""

from __future__ import annotations

SMALL = [
    *("--device", "cpu", "--dtype", "float32", "--quiet"),
    *("--context", "128", "--stride", "48", "--windows", "2", "--batch", "2"),
    *("--append", "20", "--piece", "7", "--decode", "12"),
]
PLAIN = ["--variant", "backend=reference,share=off"]
SHARED = ["--variant", "backend=reference,share=on"]
