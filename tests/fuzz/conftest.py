"""More random programs: `python -m pytest tests/fuzz --programs 1000 --minutes 60`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--programs", type=int, default=None, help="random programs, beside the fixed ones")
    parser.addoption("--minutes", type=float, default=60.0, help="for the random programs, at most")
