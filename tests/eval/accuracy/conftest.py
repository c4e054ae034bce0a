"""What runs of the evaluations have in common is made once: windows of the texts, models, and what is stock's alone.

Tokenising the texts, and stock beside the exact model, take longer than the patched model of a small run. A file that says
`LAYERS` gets the first layers of each model alone: what it looks at, such as the limits, does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hf_fastattn.eval import models
from hf_fastattn.eval.accuracy import options, windows
from hf_fastattn.eval.accuracy.stock_parts import StockParts

_cut: dict[Any, list[windows.Window]] = {}
_loaded: dict[Any, tuple[Any, Any]] = {}
_stock: dict[int | None, StockParts] = {}


@pytest.fixture(autouse=True)
def parts_are_kept(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    load, layers = models.load, getattr(request.module, "LAYERS", None)

    def choose(texts: Sequence[Any], tokenizer: Any, **sizes: Any) -> list[windows.Window]:
        key = (tuple(document.text for document in texts), len(tokenizer), *sorted(sizes.items()))
        if key not in _cut:
            _cut[key] = windows.choose(texts, tokenizer, **sizes)
        return _cut[key]

    def load_once(name: str, dtype: torch.dtype, device: str, window: int | None = None) -> tuple[Any, Any]:
        key = name, dtype, device, window, layers
        if key not in _loaded:
            _loaded[key] = load(name, dtype, device, window)
            if layers is not None:
                _loaded[key][0].model.layers = _loaded[key][0].model.layers[:layers]
                _loaded[key][0].config.num_hidden_layers = layers
        model = _loaded[key][0]
        # A run leaves the model as it found it.
        assert not hasattr(model, "_fastattn") and not any("forward" in vars(module) for module in model.modules())
        assert all(parameter.dtype == dtype for parameter in model.parameters())
        return _loaded[key]

    monkeypatch.setattr(options, "choose", choose)
    monkeypatch.setattr(models, "load", load_once)
    monkeypatch.setattr(options, "StockParts", lambda: _stock.setdefault(layers, StockParts()))
