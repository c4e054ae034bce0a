"""What the device can do: the speed of reading memory, of copying it, and of a matrix product, measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from hf_fastattn.eval.kernel_speed.graph_timer import Timer

ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """Attributes: bytes a second read, bytes a second read and written by a copy, operations a second in bf16 products."""

    read: float
    copy: float
    matmul: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured with 4 GiB of memory and a product of 8192-sized matrices; on a CPU with 64 MiB and 512."""
    on_gpu = device.type == "cuda"
    elements, size = (2**31, 8192) if on_gpu else (2**24, 512)
    data = torch.ones(elements, dtype=dtype, device=device)
    wide = data.view(torch.float32)
    read = data.nbytes / _seconds(lambda i: wide.sum(), device)
    target = torch.empty_like(data)
    copy = 2 * data.nbytes / _seconds(lambda i: torch.neg(data, out=target), device)
    a, b = torch.ones(2, size, size, dtype=dtype, device=device)
    matmul = 2 * size**3 / _seconds(lambda i: a @ b, device)
    return Ceilings(read, copy, matmul)


def _seconds(launch, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    timer = Timer(launch, 4, device)
    return statistics.median(timer() for _ in range(ROUNDS))
