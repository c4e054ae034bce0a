"""Where a test of the loop runs: on the CPU over static tensors, since nothing is recorded there, and on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.tools.reexecuted import reexecuted_loop


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with reexecuted_loop() if request.param == "cpu" else contextlib.nullcontext():
        yield request.param
