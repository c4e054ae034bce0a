"""What a compiled kernel takes of a multiprocessor: registers, spilled bytes, shared memory, warps.

On Hopper registers and spills are read from the very binary that would run: what is assembled once more, with other
options than Triton's, has others.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import CompiledKernel

from tests.tools.targets import RESERVED, Target

# The disassemblers that come in the Triton wheel.
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """Of one specialisation of `kernel` compiled for `target`.

    `serialised` are the assembler's remarks on asynchronous products that it makes wait for each other, if asked for.
    """

    kernel: str
    target: Target
    registers: int
    spilled_bytes: int
    shared_memory: int
    warps: int
    uses_tf32: bool
    serialised: tuple[str, ...]

    @property
    def programs_per_processor(self) -> int:
        """How many programs a multiprocessor holds at once, by registers (given out in eights) and shared memory."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(65_536 // registers, self.target.processor_memory // (self.shared_memory + RESERVED))


def resources(compiled: CompiledKernel, target: Target, remarks: bool = False) -> Resources:
    """Reads the binary; no driver is needed. For the `remarks` of the assembler it is assembled once more."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage = _output([_TOOLS / "cuobjdump", "-res-usage", binary])
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
        # A spill needs a stack frame, and most kernels have none.
        spilled = _spilled(compiled, target, binary) if int(stack) else 0
        serialised = _remarks(compiled, target, Path(folder)) if remarks and "wgmma" in compiled.asm["ptx"] else ()
    return Resources(
        kernel=compiled.src.fn.__name__,
        target=target,
        registers=int(registers),
        spilled_bytes=spilled,
        shared_memory=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        # Three products in TF32 begin with rounding both factors, to split off what TF32 leaves out.
        uses_tf32="tf32" in compiled.asm["ptx"] and "cvt.rna.tf32" not in compiled.asm["ptx"],
        serialised=serialised,
    )


def _spilled(compiled: CompiledKernel, target: Target, binary: Path) -> int:
    if target.arch == 90:
        return _spilled_bytes(_output([_TOOLS / "nvdisasm", "-c", binary]))
    # Elsewhere by the assembler's own level of allocation: that of Triton 3.9 has been looked at for Hopper only.
    source = binary.with_name("kernel.ptx")
    source.write_text(compiled.asm["ptx"])
    command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={target.ptxas_name}", source]
    log = _output([*command, "-o", binary.with_name("again.cubin")])
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", log))


def _spilled_bytes(code: str) -> int:
    """Bytes a thread stores to its local memory, which is where registers go that there is no room for."""
    return sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.(\d+))? ", code))


def _remarks(compiled: CompiledKernel, target: Target, folder: Path) -> tuple[str, ...]:
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    options = (compiled.metadata.ptx_options or "").split()
    command = [get_ptxas(target.arch).path, "-v", *options, f"--gpu-name={target.ptxas_name}", source]
    return tuple(re.findall(r"\(C75\d\d\).*", _output([*command, "-o", folder / "again.cubin"])))


def _output(command: list[str | Path]) -> str:
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout + process.stderr
