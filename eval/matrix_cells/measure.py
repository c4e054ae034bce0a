"""A cell measured: whether both sides agree, interleaved pairs of calls, peaks of memory, and what is wrong with ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from hf_fastattn.eval.accuracy.verdict import MAXIMUM_FACTOR
from hf_fastattn.eval.generate_speed.bench import free_memory
from hf_fastattn.eval.matrix_cells.calls import GREEDY
from hf_fastattn.eval.matrix_cells.cells import Cell, allowed
from hf_fastattn.eval.matrix_cells.side import Side, path_of, sides
from hf_fastattn.eval.matrix_cells.states import is_exact

# Ours may take so much more time than stock; on a CPU other processes take turns. It is the time that passes: a process's
# own counts threads twice that wait in a loop for the next operation, now and then.
SLOWER = {"cuda": 1.03, "cpu": 1.10}
# And so much more memory: both must be passed.
LARGER, LARGER_BYTES = 1.03, 128 * 10**6
# Roundings of the greatest logit that are no error.
ROUNDINGS = 4
TIMED = {"first": "first token", "token": "a token"}
TOKENS = 8
# Times the rounds that a cell gets in all if ours looks slower after the first ones: a call of a few milliseconds is often
# so by chance.
DOUBTFUL = 4


def measure(cell: Cell, device: torch.device, new: int, pairs: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a cell.

    Args:
        new: tokens after the first that are timed.
        pairs: interleaved rounds; where ours is slower after these, there are DOUBTFUL times as many.
        options: of `hf_fastattn.patch`.
    """
    free_memory()
    stock, ours = sides(cell, device, options)
    agrees, detail = agreement(stock, ours)
    for side in (stock, ours):
        side.warm_up(new)
    standard = SLOWER[device.type]
    named = {name: allowed(cell.name, words, device.type) or (standard, "") for name, words in TIMED.items()}
    limits = {name: limit for name, (limit, _) in named.items()}
    _measure_rounds(stock, ours, range(1, pairs + 1), new)
    if any(min(ratios(stock, ours, name, new)) > limits[name] for name in TIMED):
        _measure_rounds(stock, ours, range(pairs + 1, DOUBTFUL * pairs + 1), new)
    found = {name: ratios(stock, ours, name, new) for name in TIMED}
    row = {
        **asdict(cell),
        "name": cell.name,
        "agrees": agrees,
        "detail": detail,
        "path": path_of(ours),
        "ratios": {name: median for name, (median, _) in found.items()},
        "best_ratios": {name: best for name, (_, best) in found.items()},
        "stock": figures(stock),
        "ours": figures(ours),
    }
    said = red(row, limits)
    # Named only where they are needed.
    reasons = [reason for name, (_, reason) in named.items() if reason and _is_slower(row, name, standard)]
    return {**row, "red": said, "allowed": "" if said else "; ".join(reasons)}


def _measure_rounds(stock: Side, ours: Side, numbers: range, new: int) -> None:
    for number in numbers:
        for side in (stock, ours) if number % 2 else (ours, stock):
            side.measure(number, new)


def agreement(stock: Side, ours: Side) -> tuple[bool, str]:
    """Whether both compute the same: the first logits, and in fp32 the tokens of calls that do not draw."""
    theirs, mine, exact = stock.first_logits(0), ours.first_logits(0), stock.exact_logits(0)
    bits = torch.finfo(torch.float32 if is_exact(stock.cell.state) else torch.bfloat16).eps
    allowed = MAXIMUM_FACTOR * _error(theirs, exact) + ROUNDINGS * bits * exact.abs().max().item()
    detail = f"logits err {_error(mine, exact):.3g}, allowed {allowed:.3g}"
    if not _error(mine, exact) <= allowed:
        return False, detail
    if (
        is_exact(stock.cell.state)
        and stock.cell.call in GREEDY
        and not torch.equal(*(s.tokens(0, TOKENS) for s in (stock, ours)))
    ):
        return False, f"{detail}; the tokens are not stock's"
    return True, detail


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return (logits - exact).abs().max().item() if logits.shape == exact.shape else float("inf")


def ratios(stock: Side, ours: Side, name: str, new: int) -> tuple[float, float]:
    """Ours over stock: the median of the pairs, and of the best calls of each."""
    pairs = [getattr(a, name) / getattr(b, name) for a, b in zip(ours.timings, stock.timings, strict=True)]
    return statistics.median(pairs), _best(ours, name, new) / _best(stock, name, new)


def _best(side: Side, name: str, new: int) -> float:
    first = min(timing.first for timing in side.timings)
    whole = min(timing.first + new * timing.token for timing in side.timings)
    return first if name == "first" else (whole - first) / new


def figures(side: Side) -> dict[str, Any]:
    """Medians, and the peak of memory."""
    medians = {f"{name}_ms": 1e3 * statistics.median(getattr(t, name) for t in side.timings) for name in ("first", "token")}
    peak = None if side.peak is None else {**asdict(side.peak), "total": side.peak.total}
    return {**medians, "peak": peak, "timings": [asdict(timing) for timing in side.timings]}


def red(row: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """What is wrong with ours.

    Args:
        limits: the most that our time may be of stock's, by the names in TIMED.
    """
    found = [] if row["agrees"] else ["computes something else"]
    for name, words in TIMED.items():
        if _is_slower(row, name, limits[name]):
            found.append(f"{words} {row['ratios'][name]:.2f} x stock's time")
    if row["ours"]["peak"] is not None:
        ours, stock = row["ours"]["peak"]["total"], row["stock"]["peak"]["total"]
        if ours > LARGER * stock and ours > stock + LARGER_BYTES:
            found.append(f"{(ours - stock) / 1e6:.0f} MB more than stock")
    return found


def _is_slower(row: Mapping[str, Any], name: str, limit: float) -> bool:
    """Slower is what is so in the median and at its best."""
    return bool(min(row["ratios"][name], row["best_ratios"][name]) > limit)
