"""A driver without a GPU: real launchers run on CPU tensors, compile exactly what they would on the GPU, launch nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import triton
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from tests.tools.targets import Target


@contextmanager
def fake_driver(target: Target) -> Iterator[FakeDriver]:
    """Makes a `FakeDriver` the active one for the length of a block; `compiled()` says what the block launched."""
    previous, fake = driver._active, FakeDriver(target)
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver.set_active(previous)
        fake.forget()


@contextmanager
def counting_driver(target: Target) -> Iterator[FakeDriver]:
    """A fake driver for which nothing is compiled: `compiled()` gives as many things as it would give kernels."""
    with fake_driver(target) as fake:

        def noted(source: Any, **kwargs: Any) -> MagicMock:
            fake.launched.add(source.fn)
            return MagicMock()

        with patch.object(triton.compiler, "compile", noted):
            yield fake


class FakeDriver(DriverBase):
    """Answers what Triton asks of a driver between a launcher and the GPU."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = _Utils(target)
        self.launched: set[JITFunction] = set()

    def compiled(self) -> list[CompiledKernel]:
        """Every specialisation compiled since the driver became active."""
        return [kernel for function in self.launched for kernel in self._cache(function).values()]

    def forget(self) -> None:
        """Empties Triton's per-device cache, so that the next block sees its own launches only."""
        for function in self.launched:
            del function.device_caches[self.target.arch]

    def _cache(self, function: JITFunction) -> dict[Any, CompiledKernel]:
        return function.device_caches[self.target.arch][0]

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.launched.add(source.fn)
        return lambda *args: None

    # The number of the device is its architecture: Triton caches kernels and device properties by it.
    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_target(self) -> Any:
        return self.target.gpu

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("a kernel was timed while nothing can be launched")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    @classmethod
    def is_active(cls) -> bool:
        return True


class _Utils:
    def __init__(self, target: Target) -> None:
        self.target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_memory, "multiprocessor_count": 132, "max_num_regs": 65_536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """No module (there is nothing to unload), a handle, registers, spills, and the most threads of a program."""
        return None, 0, 0, 0, 1024
