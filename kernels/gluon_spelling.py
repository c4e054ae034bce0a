"""What the Hopper kernels have to say differently to different versions of Triton."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.9 calls it `async_load`, and keeps the name of 3.6 as one that raises.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Triton 3.9 holds the assembler to level 2, which spills up to 160 bytes around the loops; this is the assembler's own
# level. That of 3.6 makes the same code either way.
ASSEMBLER_OPTIONS = "--regAllocOptLevel=4"
