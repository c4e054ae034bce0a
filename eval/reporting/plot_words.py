"""Plain words and numbers for the pictures: ticks, units, and names of series."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

UNITS = {1.0: "", 1e-3: "thousandths of ", 1e-6: "millionths of ", 1e-9: "billionths of ", 1e-12: "trillionths of "}
LARGE = {1e12: "trillion", 1e9: "billion", 1e6: "million"}
# Ticks of an axis shorter than a power of ten.
SHORT = (1, 1.5, 2, 3, 4, 5, 7)
OPTIONS = {
    "cuda_graphs=True": "CUDA graphs",
    "cuda_graphs=False": "no graphs",
    "share=on": "shared pages",
    "share=off": "",
    "loop=on": "device's loop",
    "alone=on": "rows alone",
    "prefix_cache=True": "prefix cache",
    "batch_invariant=True": "batch-invariant",
}


def plain(value: float, _: object = None) -> str:
    """`0.001`, `50`, `1,000`, `3 million`; a tick formatter of matplotlib."""
    for size, word in LARGE.items():
        if value >= size:
            return f"{value / size:g} {word}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.6g}" if value >= 1e-4 else f"{value:.7f}".rstrip("0")


def measured(value: float) -> str:
    """A measured time with three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def largest(values: Iterable[float]) -> float:
    """The largest that is a number, or 1."""
    return max((value for value in values if math.isfinite(value)), default=1.0)


def unit(values: Iterable[float]) -> tuple[float, str]:
    """What to divide by so that the values have few digits, and the words for it before the thing measured."""
    most = largest(values)
    for size, words in UNITS.items():
        if most >= size:
            return size, words
    return 1e-12, UNITS[1e-12]


def logarithmic(axis: Any, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """A logarithmic axis of matplotlib whose ticks are plain numbers: `subs` times powers of ten, more on a short one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=subs if high > 10 * low else SHORT, numticks=9))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())


def series(name: str) -> str:
    """The name of a series: `backend=triton,cuda_graphs=True,share=on` as `triton, CUDA graphs, shared pages`."""
    if name == "stock":
        return "stock, in pieces"
    if "=" not in name:
        return name
    parts = [OPTIONS.get(part, part.removeprefix("backend=")) for part in name.split(",")]
    parts = [f"pages of {part.removeprefix('page_size=')}" if part.startswith("page_size=") else part for part in parts]
    return ", ".join(part for part in parts if part)
