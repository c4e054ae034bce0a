"""`attn_implementation="fastattn"` is registered for the length of each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AttentionInterface, AttentionMaskInterface

import hf_fastattn
from hf_fastattn import interface
from hf_fastattn.interface import counters
from hf_fastattn.stock_batching.doors import NAMES


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registered for the length of a test, with counters at zero."""
    hf_fastattn.register()
    counters.reset()
    yield
    for registry in (AttentionInterface, AttentionMaskInterface):
        for name in NAMES:
            registry._global_mapping.pop(name)


@pytest.fixture(autouse=True)
def kernels_everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels run also what PyTorch's attention would do as quickly, but in tests of that choice."""
    if request.node.path.name != "test_choice.py":
        monkeypatch.setattr(interface, "why_stock_is_enough", lambda *given: None)
