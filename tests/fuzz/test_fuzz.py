"""A minute of random programs; `python -m tests.fuzz --programs 1000` runs more."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from tests.fuzz.draw import draw
from tests.fuzz.run import is_rounding, run_program
from tests.fuzz.shrink import shrink


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_programs(first: int) -> None:
    for seed in range(first, first + 10):
        program = draw(seed)
        result = run_program(program)
        if result.problem is not None and not is_rounding(program):
            pytest.fail(f"seed {seed}, step {result.step}: {result.problem}\n{json.dumps(shrink(program))}")
