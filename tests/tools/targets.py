"""The GPUs that kernels are compiled for, on a machine that has none of them."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

# Shared memory that CUDA keeps for itself, a program.
RESERVED = 1024


@dataclass(frozen=True)
class Target:
    """One compute capability, and the most shared memory that a program may ask for there (the compiler does not check)."""

    name: str
    arch: int
    shared_memory: int

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    @property
    def processor_memory(self) -> int:
        """Shared memory of a multiprocessor: one program may ask for nearly all."""
        return self.shared_memory + RESERVED

    @property
    def ptxas_name(self) -> str:
        """The name Triton gives to ptxas: from Hopper on, with the features of exactly this architecture."""
        return f"{self.name}a" if self.arch >= 90 else self.name


TARGETS = {
    target.name: target
    for target in (Target("sm_80", 80, 166_912), Target("sm_90", 90, 232_448), Target("sm_100", 100, 232_448))
}
