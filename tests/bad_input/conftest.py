"""What an interrupt may leave behind without a fault of ours."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def gradients_on_again() -> Iterator[None]:
    """An interrupt inside `torch.no_grad` itself, in `generate()` of either model, leaves gradients off."""
    with torch.enable_grad():
        yield
