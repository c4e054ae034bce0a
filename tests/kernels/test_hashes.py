"""A kernel's place in Triton's cache on disk does not depend on the process, nor on what ran before it there."""

from __future__ import annotations

import subprocess
import sys

from tests.tools.fresh import fresh

CODE = """
from hf_fastattn.kernels.sampling import draw, greedy
if {first!r}:
    for function in vars(greedy).values():
        getattr(function, "cache_key", None)
print(draw.scan_logits_kernel.cache_key, draw.draw_kernel.cache_key)
"""


def test_the_order_of_launches_changes_no_hash() -> None:
    command = [sys.executable, "-c", CODE.format(first=False)]
    alone = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert len(alone.split()) == 2 and fresh(CODE.format(first=True)) == alone
