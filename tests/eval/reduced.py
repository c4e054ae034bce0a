"""The evaluations on a set small enough for every test run."""

from __future__ import annotations

SMALL = [
    *("--device", "cpu", "--dtype", "float32", "--quiet"),
    *("--context", "96", "--stride", "24", "--windows", "2", "--batch", "2"),
    *("--append", "12", "--piece", "5", "--decode", "6"),
]
PLAIN = ["--variant", "backend=reference,share=off"]
SHARED = ["--variant", "backend=reference,share=on"]
