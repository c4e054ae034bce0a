"""How memory is made that the GPUs of several ranks read: without multicast."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Multicast over NVLink is not needed here, and setting it up can fail where plain reads between GPUs work.
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


def shared_memory(
    numel: int, dtype: torch.dtype, device: torch.device, group: Any, everywhere: Callable[[bool], bool]
) -> tuple[Tensor, Any]:
    """`[numel]` of this rank, not initialised, and PyTorch's handle of it and of the other ranks'.

    Args:
        group: every rank of which calls this at the same time.
        everywhere: whether something holds on all of them.

    Raises:
        Exception: there is no memory on this rank.
        RuntimeError: or on another one, which would not come to where ranks exchange their handles.
    """
    import torch.distributed._symmetric_memory as symmetric

    with torch.inference_mode(False), torch.cuda.device(device), without_multicast():
        held, failure = None, None
        try:
            held = symmetric.empty(numel, dtype=dtype, device=device)
        except Exception as error:
            failure = error
        if not everywhere(failure is None) or held is None:
            raise failure or RuntimeError("another rank has no memory for it")
        return held, symmetric.rendezvous(held, group)


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
