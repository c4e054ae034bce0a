"""`attn_implementation="fastattn"` is registered for the length of each test."""

from __future__ import annotations

import pytest

from hf_fastattn import interface
from tests.tools.registered import registered as registered


@pytest.fixture(autouse=True)
def kernels_everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels run also what PyTorch's attention would do as quickly, but in tests of that choice."""
    if request.node.path.name not in ("test_choice.py", "test_further_layers.py"):
        monkeypatch.setattr(interface, "why_stock_is_enough", lambda *given: None)
