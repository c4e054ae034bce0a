"""A kernel's place in Triton's cache on disk does not depend on what ran before it in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
from hf_fastattn.kernels.sampling import draw, greedy
if {first!r}:
    for function in vars(greedy).values():
        getattr(function, "cache_key", None)
print(draw.scan_logits_kernel.cache_key, draw.draw_kernel.cache_key)
"""


@pytest.mark.parametrize("first", [False, True])
def test_the_order_of_launches_changes_no_hash(first: bool, request: pytest.FixtureRequest) -> None:
    done = subprocess.run([sys.executable, "-c", CODE.format(first=first)], check=True, capture_output=True, text=True)
    seen = request.config.stash.setdefault(KEY, done.stdout)
    assert len(done.stdout.split()) == 2 and done.stdout == seen


KEY = pytest.StashKey[str]()
