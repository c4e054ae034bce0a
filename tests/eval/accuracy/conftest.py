"""Texts are cut into windows once for all runs that ask for the same ones: tokenising them takes longer than a small run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from hf_fastattn.eval.accuracy import options, windows

_cut: dict[Any, list[windows.Window]] = {}


@pytest.fixture(autouse=True)
def windows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(texts: Sequence[Any], tokenizer: Any, **sizes: Any) -> list[windows.Window]:
        key = (tuple(document.text for document in texts), len(tokenizer), *sorted(sizes.items()))
        if key not in _cut:
            _cut[key] = windows.choose(texts, tokenizer, **sizes)
        return _cut[key]

    monkeypatch.setattr(options, "choose", choose)
