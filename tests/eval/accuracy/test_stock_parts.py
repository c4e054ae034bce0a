"""What is stock's alone is measured once for runs of the same settings, and gives the same figures as measuring anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_fastattn.eval import fault_table, logprobs, parity, perplexity
from hf_fastattn.eval.accuracy import stock_parts
from hf_fastattn.eval.accuracy.stock_parts import StockParts
from tests.eval.reduced import PLAIN, SMALL

LAYERS = 2
MEASURED: dict[str, tuple[Any, str, list[str]]] = {
    "perplexity": (perplexity, "stock_losses", []),
    "parity": (parity, "measure_stock", ["--new", "4"]),
    "logprobs": (logprobs, "measure_stock", ["--new", "4", "--samples", "2"]),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_second_run_finds_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, options = MEASURED[name]
    measure, count = getattr(module, function), []
    monkeypatch.setattr(module, function, lambda *a, **k: count.append(a) or measure(*a, **k))
    given, kept = [*SMALL, "--windows", "2", "--context", "64", *PLAIN, *options], StockParts()
    first = fault_table.evaluate(name, given, kept)
    assert len(count) == 1
    again = fault_table.evaluate(name, given, kept)
    assert len(count) == 1 and again["checks"] == first["checks"] and again["series"] == first["series"]
    # A fault is none of the settings that stock depends on; the seed draws other windows.
    red = fault_table.evaluate(name, [*given, "--inject", "mask"], kept)
    assert len(count) == 1 and red["verdict"] == "red" and first["verdict"] == "green"
    fault_table.evaluate(name, [*given, "--seed", "1"], kept)
    assert len(count) == 2


def test_not_more_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_parts, "MOST_BYTES", 100)
    kept, count = StockParts(), list[str]()

    def part(name: str, size: int) -> Any:
        return kept.of(name, lambda: (count.append(name), [0.0], torch.zeros(size)))

    for _ in range(2):
        part("small", 20), part("large", 30)
    assert count == ["small", "large", "large"]
