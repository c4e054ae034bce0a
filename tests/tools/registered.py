"""`attn_implementation="fastattn"`, registered for the length of each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import AttentionInterface, AttentionMaskInterface

import hf_fastattn
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
