"""What remains between decode and forward in batch-invariant mode is held against what stock's two ways differ by."""

from __future__ import annotations

from typing import Any

import pytest

from hf_fastattn.eval.accuracy.logprobs_summary import summarise
from hf_fastattn.eval.accuracy.variants import parse

VARIANT = parse("backend=triton,batch_invariant=on,share=on")
STOCKS = 0.01


def alarms(rms: float, layers: list[float]) -> dict[str, bool]:
    counters: dict[str, Any] = {name: {} for name in ("fallbacks", "not_looped", "uncaptured")}
    counters |= {"forwards": 1, "fast_loops": 0, "graphs_replayed": 0, "steps": [], "backend": "triton", "planted": 0}
    rows = [[STOCKS, -STOCKS], [STOCKS, STOCKS]]
    remains = {"layers": layers, "squares": 4 * rms**2, "without_products": 0.0, "tokens": 4}
    record = {
        "series": {"stock": rows, VARIANT.name: rows}, "size": [[1.0, 1.0]] * 2, "error": rows, "draws": {},
        "counters": {VARIANT.name: counters}, "remains": {VARIANT.name: remains},
    }  # fmt: skip
    found = summarise([record], [0, 1], [VARIANT])
    assert found["remains"][VARIANT.name]["rms"] == pytest.approx(rms)
    return {check["name"]: check["alarms"] for check in found["checks"]}


def test_at_most_stocks_own() -> None:
    found = alarms(0.99 * STOCKS, [0.0, 0.0])
    assert len(found) == 5 and not any(found.values())


def test_more_is_red() -> None:
    found = alarms(1.01 * STOCKS, [0.0, 0.0])
    assert [name for name, red in found.items() if red] == ["decode less a forward over our pages, rms"]


def test_a_layer_that_differs_is_red() -> None:
    found = alarms(0.0, [0.0, 1e-3])
    assert [name for name, red in found.items() if red] == ["layers whose attention is not equal to the bit"]
