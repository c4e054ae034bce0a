"""Notes what each test of kernels on a GPU compiles: other tests of the same process compile for models of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.kernels.specialised import BY_SWEEPS, BY_TESTS, specialisations


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker("gpu") is None:
        return (yield)
    before = specialisations()
    try:
        return (yield)
    finally:
        new = Counter(specialisations())
        new.subtract(before)
        BY_TESTS.update(new)
        if getattr(item, "originalname", "").startswith("test_sweep"):
            BY_SWEEPS.update(new)
