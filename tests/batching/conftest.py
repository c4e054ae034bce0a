"""Where a test of running batches runs: by forwards on the CPU, by steps over static tensors there, and on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.tools.reexecuted import reexecuted_loop


@pytest.fixture(params=["host", "steps", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted_loop() if request.param == "steps" else contextlib.nullcontext():
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Steps are recorded, and run again over static tensors, on the CPU."""
    with reexecuted_loop():
        yield
