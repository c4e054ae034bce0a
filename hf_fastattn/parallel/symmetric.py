"""How memory is made that the GPUs of several ranks read: without multicast."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Multicast over NVLink is not needed here, and setting it up can fail where plain reads between GPUs work.
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@contextlib.contextmanager
def without_multicast() -> Iterator[None]:
    """A block in which PyTorch sets up none."""
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before
